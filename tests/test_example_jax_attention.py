"""examples/jax_attention on the CPU, as two devices, with the twin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax.ffi", reason="needs JAX 0.5 or newer")
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "examples.jax_attention", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_on_the_twin():
    import jax

    printed = run("--seqlen", "384", "--heads", "4", "--kv-heads", "2", "--cpu-devices", "2")
    assert "on 2 x cpu" in printed and "384 tokens, 4 query and 2 KV heads" in printed
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    names = "jax.nn.dot_product_attention (XLA)", "salekit.jax.dense_attention", "salekit.jax.sparse_attention"
    errors = [float(lines[name][-1]) for name in names]
    assert all(float(lines[name][-2]) > 0 for name in names)
    assert errors[0] <= 0.01 and errors[1] == 0 and 0 < errors[2] <= 0.2, printed
    assert "the same bits as two calls: True" in printed
    if hasattr(jax, "shard_map"):
        assert "heads over 2 devices" in printed and "the same bits: True" in printed


def test_help():
    printed = run("--help")
    assert all(option in printed for option in ("--seqlen", "--tau", "--cpu-devices"))
