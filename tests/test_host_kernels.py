"""Every kernel compiles for every architecture without spills or serialised products; planted faults are found."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("cupy")

from salekit.cli import kernels as command  # noqa: E402

from salekit import catalog, jit  # noqa: E402
from salekit.jit import KernelSpec  # noqa: E402
from salekit.plans import SUPPORTED_ARCHS  # noqa: E402

SPILL = """
__global__ void __launch_bounds__(1024, 2) planted(const float* x, float* y) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[i * 4096 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 4096 + threadIdx.x] = a[i] * a[63 - i];
}
"""
SERIAL = """
#include "ptx/wgmma.cuh"
__global__ void __launch_bounds__(128) planted(int* out, const int* choice, uint64_t a, uint64_t b) {
  int d[64] = {};
  if (choice[threadIdx.x] > 0) {
    wgmma_fence();
    wgmma_m64n128k32_s8(d, a, b, true);
    wgmma_commit();
    d[0] += choice[1];
    wgmma_m64n128k32_s8(d, a, b, true);
    wgmma_commit();
    wgmma_wait<0>();
  }
  for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = d[i];
}
"""
ERROR = "__global__ void planted(float* x) { x[0] = nothing; }\n"


WHOLE = ("sm_80", "sm_90a")  # of the others every third of the plain kernels: ``salekit kernels`` compiles them all


@pytest.mark.parametrize("arch", SUPPORTED_ARCHS)
def test_all_kernels_compile_clean(arch):
    specs = [spec for _, spec in catalog.all_specs(arch, arch in WHOLE)]
    specs = specs if arch in WHOLE else specs[SUPPORTED_ARCHS.index(arch) % 3 :: 3]
    assert len(specs) == len(set(specs)) > 30
    problems = {}
    for spec, (info, error) in zip(specs, command.compile_all(specs, arch)):
        problem = command.problem_of(info, error) or (info.stack_bytes and "stack") or info.warnings
        if problem:
            problems[spec.label] = problem
    assert not problems


@pytest.mark.parametrize("source, word", ((SPILL, "spills"), (SERIAL, "serializ"), (ERROR, "undefined")))
def test_planted_faults_exit_4(source, word, tmp_path, monkeypatch):
    root = jit.source_root()
    planted = tmp_path / "src"
    for folder in ("ptx", "tile"):
        (planted / folder).mkdir(parents=True)
        for path in (root / folder).iterdir():
            (planted / folder / path.name).write_text(path.read_text())
    (planted / "kernels").mkdir()
    (planted / "kernels" / "planted.cu").write_text(source)
    monkeypatch.setattr(jit, "source_root", lambda: planted)
    monkeypatch.setattr(catalog, "all_specs", lambda arch: [("test", KernelSpec("planted"))])
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "cache"))
    caches = (jit._read, jit._headers, jit.cache_key)
    for cached in caches:
        cached.cache_clear()
    try:
        result = CliRunner().invoke(command.kernels, ["--arch", "sm_90a", "--json"])
    finally:
        for cached in caches:
            cached.cache_clear()
    assert result.exit_code == 4
    entry = json.loads(result.stdout)["kernels"][0]
    assert word in entry["problem"]
