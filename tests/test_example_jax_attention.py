"""examples/jax_attention on the CPU, as two devices, with the twin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax.ffi", reason="needs JAX 0.5 or newer")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # examples/ is part of the checkout, not of the package

from examples.jax_attention import __main__ as program  # noqa: E402


def start(*arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "examples.jax_attention", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def run(*arguments):
    done = start(*arguments)
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


@pytest.mark.parametrize(
    "given, said",
    (
        *((f"{option} 0", f"{option}: got 0; wants at least 1")
          for option in ("--seqlen", "--heads", "--kv-heads", "--cpu-devices")),
        *((f"{option} -1", f"{option}: got -1; wants at least 1") for option in ("--seqlen", "--cpu-devices")),
        *((f"--tau {tau}", f"--tau: got {tau}; wants a number >= 0 or inf") for tau in ("-1", "nan")),
    ),
)
def test_numbers_that_make_no_sense(given, said, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # before JAX starts
    monkeypatch.setattr(sys, "argv", ["jax_attention", *given.split()])
    with pytest.raises(SystemExit) as done:
        program.main()
    assert done.value.code == 1 and capsys.readouterr().err == f"jax_attention: error: {said}\n"


def test_heads_that_cannot_be_shared_out():
    done = start("--heads", "3", "--kv-heads", "2", "--cpu-devices", "1")
    said = "jax_attention: error: --kv-heads: got 2 for 3 heads; wants a number that divides them"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == said and "Traceback" not in done.stderr
