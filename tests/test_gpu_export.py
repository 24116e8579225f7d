"""The exported kernels under the C++ program: the bits of Python, on the GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy")

from salekit import export, jit  # noqa: E402
from salekit.plans import LOW_BIT_ARCHS, LOW_BIT_HEAD_DIMS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "cpp_driver_api" / "run.py"
BLOCKS = ((128, 32), (64, 64))
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

pytestmark = pytest.mark.gpu


def load_example():
    spec = importlib.util.spec_from_file_location("cpp_driver_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()
needs_compiler = pytest.mark.skipif(
    not (shutil.which("cc") and shutil.which("c++") and example.find_include()), reason="no cc, c++ or cuda.h"
)


KINDS = ((128, "bfloat16"), (64, "float16"), (96, "float16"), (192, "bfloat16"), (256, "bfloat16"))


@pytest.fixture(scope="module", params=KINDS, ids=lambda x: f"d{x[0]}-{x[1]}")
def built(request, tmp_path_factory):
    """(program, export's folder, head_dim, dtype)."""
    head_dim, dtype = request.param
    folder = tmp_path_factory.mktemp("export")
    export.export(folder, export.Target(jit.device_arch(), head_dim, dtype, blocks=BLOCKS))
    program = example.build(folder, folder / "build", example.find_include(), [example.find_driver()])
    return program, folder, head_dim, DTYPES[dtype]


def make(seqlen_q, seqlen_k, heads, kv_heads, head_dim, dtype, batch=1):
    rng = np.random.default_rng(seqlen_q)
    sizes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    return [rng.standard_normal((batch, rows, count, head_dim), np.float32).astype(dtype) for rows, count in sizes]


def check(built, tmp_path, sizes, options, words=()):
    program, folder, head_dim, dtype = built
    is_known = jit.device_arch() in LOW_BIT_ARCHS and head_dim in LOW_BIT_HEAD_DIMS
    if options.get("attend") == "int8-fp8" and not is_known:
        pytest.skip("int8-fp8 is Hopper's, with head_dim 64 and 128")
    q, k, v = make(*sizes[:4], head_dim, dtype, *sizes[4:])
    options = {"thresholds": 0.02, "dense_below": 0, **options}
    given = tmp_path / "input.bin"
    example.write_input(given, q, k, v)
    got, text = example.run_program(program, folder, given, [*example.program_options(**options), *words])
    want = example.run_python(q, k, v, options)
    assert list(map(len, got)) == list(map(len, want))
    assert example.differing(got, want) == [], text


@needs_compiler
@pytest.mark.parametrize("query_stride", (1, 2, 4))
@pytest.mark.parametrize("estimator", ("int4", "int8", "int8-sp24"))
@pytest.mark.parametrize("block", BLOCKS)
def test_estimators(built, tmp_path, estimator, block, query_stride):
    options = {"estimator": estimator, "block": block, "query_stride": query_stride, "full_rows": 300}
    check(built, tmp_path, (1237, 1237, 6, 2), options)


@needs_compiler
@pytest.mark.parametrize(
    "sizes, options",
    (
        ((1, 777, 4, 1), {}),
        ((513, 3001, 6, 2, 2), {"estimator": "int8-sp24"}),
        ((700, 300, 4, 4), {"causal": False}),
        ((700, 300, 4, 4), {"estimator": "int4"}),
        ((1100, 1100, 5, 5), {"sink": 64, "local": 500}),
        ((1100, 1100, 4, 2), {"local": 200, "softmax_scale": 0.2}),
        ((1100, 1100, 4, 2), {"thresholds": [0.0, 0.01, 0.05, float("inf")]}),
        ((1100, 1100, 4, 2), {"thresholds": 0.0}),
        ((1100, 1100, 4, 2), {"thresholds": float("inf")}),
        ((3000, 3000, 4, 2), {"dense_below": 8192}),
        ((40_000, 40_000, 4, 1), {"estimator": "int8-sp24", "query_stride": 2}),
        ((1237, 1500, 4, 2), {"attend": "int8-fp8"}),
        ((1237, 1500, 4, 2, 2), {"attend": "int8-fp8", "block": (64, 64), "dense_below": 8192}),
        ((50, 0, 4, 2), {}),
    ),
)
def test_shapes(built, tmp_path, sizes, options):
    check(built, tmp_path, sizes, options)


@needs_compiler
def test_keys_in_segments(built, tmp_path):
    head_dim = built[2]
    seqlen_k = (90 << 20) // (4 * head_dim) + 1  # K and V of a head are more than 80 MiB
    check(built, tmp_path, (16_385, seqlen_k, 4, 1), {"query_stride": 4, "block": (64, 64)})


@needs_compiler
def test_strides_graphs_and_repeats(built, tmp_path):
    program, folder, head_dim, dtype = built
    q, k, v = make(1237, 1500, 4, 2, head_dim, dtype, 2)
    options = {"thresholds": 0.02, "dense_below": 0}
    want = example.run_python(q, k, v, options)
    given = tmp_path / "input.bin"
    words = example.program_options(**options)
    example.write_input(given, q, k, v)
    for extra in (["--graph", "--repeat", 3], ["--repeat", 3], ["--launches"]):
        got, text = example.run_program(program, folder, given, [*words, *extra])
        assert example.differing(got, want) == [], extra
    assert "attend_sm" in text and "row_limits<" in text
    example.write_input(given, *(x.transpose(0, 2, 1, 3).reshape(x.shape) for x in (q, k, v)))  # bhsd in memory
    (out, lse, mask), _ = example.run_program(program, folder, given, [*words, "--bhsd"])
    out = np.frombuffer(out, dtype).reshape(2, 4, 1237, head_dim).transpose(0, 2, 1, 3)
    assert example.differing((out.tobytes(), lse, mask), want) == []


@needs_compiler
def test_kernels_for_another_gpu_are_refused(tmp_path):
    other = "sm_90a" if jit.device_arch() != "sm_90a" else "sm_80"
    export.export(tmp_path / "export", export.Target(other, 64, "float16", ("int8",), ((128, 32),)))
    program = example.build(
        tmp_path / "export", tmp_path / "build", example.find_include(), [example.find_driver()]
    )
    given = tmp_path / "input.bin"
    example.write_input(given, *make(100, 100, 2, 1, 64, DTYPES["float16"]))
    with pytest.raises(RuntimeError, match=f"the kernels are for {other}, this GPU has compute capability"):
        example.run_program(program, tmp_path / "export", given, [])


@needs_compiler
def test_the_example(tmp_path):
    command = [sys.executable, str(SCRIPT), "--repeat", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("the bits of Python") == len(example.CASES)
