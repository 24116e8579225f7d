"""The compile cache: hits, damage, many processes, bounds; and what the compiler reports. Needs NVRTC, no GPU."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("cupy")

from salekit import jit  # noqa: E402
from salekit.errors import CompileError  # noqa: E402
from salekit.jit import KernelSpec  # noqa: E402

SPEC = KernelSpec("coarsen_mask", ("2",))
ARCH = "sm_90a"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of nothing: tests write their own kernels here."""
    root = tmp_path / "src"
    (root / "kernels").mkdir(parents=True)
    (root / "tile").mkdir()
    (root / "tile" / "shared_bytes.cuh").write_text(jit._read("tile/shared_bytes.cuh"))
    monkeypatch.setattr(jit, "source_root", lambda: root)
    for cached in (jit._read, jit._headers, jit.cache_key):
        cached.cache_clear()
    yield root
    for cached in (jit._read, jit._headers, jit.cache_key):
        cached.cache_clear()


def count_compiles(monkeypatch):
    calls = []
    real = jit._compile
    monkeypatch.setattr(jit, "_compile", lambda *args: calls.append(args) or real(*args))
    return calls


def test_second_compile_is_a_hit(cache, monkeypatch):
    calls = count_compiles(monkeypatch)
    first, second = jit.compile_kernel(SPEC, ARCH), jit.compile_kernel(SPEC, ARCH)
    assert len(calls) == 1 and first.path == second.path and first.info == second.info
    assert first.info.registers > 0 and first.cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("damage", ("truncate", "flip", "json", "missing"))
def test_a_damaged_entry_is_rebuilt(cache, monkeypatch, damage):
    first = jit.compile_kernel(SPEC, ARCH)
    data = first.cubin
    if damage == "truncate":
        first.path.write_bytes(data[:100])
    elif damage == "flip":
        first.path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "missing":
        first.path.unlink()
    else:
        next(cache.glob("*.json")).write_text("{")
    calls = count_compiles(monkeypatch)
    again = jit.compile_kernel(SPEC, ARCH)
    assert len(calls) == 1 and again.cubin == data


@pytest.mark.gpu  # where there is a driver, NVRTC has a cache of its own, whose results have no log
def test_figures_come_from_every_compilation(cache):
    infos = [jit.compile_kernel(SPEC, jit.device_arch(), cache=False).info for _ in range(3)]
    assert len({info.registers for info in infos}) == 1 and infos[0].registers > 0


def test_key_follows_included_files(sources):
    (sources / "kernels" / "k.cu").write_text('#include "tile/a.cuh"\n__global__ void k(float* x) { x[0] = A; }\n')
    (sources / "tile" / "a.cuh").write_text("#define A 1\n")
    before = jit.cache_key(KernelSpec("k"), ARCH)
    (sources / "tile" / "a.cuh").write_text("#define A 2\n")
    for cached in (jit._read, jit._headers, jit.cache_key):
        cached.cache_clear()
    assert jit.cache_key(KernelSpec("k"), ARCH) != before
    assert jit.cache_key(KernelSpec("k"), "sm_80") != jit.cache_key(KernelSpec("k"), ARCH)


def test_cache_is_bounded(cache, monkeypatch):
    monkeypatch.setenv("SALEKIT_CACHE_MAX_BYTES", "20000")
    for factor in ("2", "4"):
        jit.compile_kernel(KernelSpec("coarsen_mask", (factor,)), ARCH)
        jit.compile_kernel(KernelSpec("row_limits", ("true" if factor == "2" else "false",)), ARCH)
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 20000


def test_unwritable_cache_still_compiles(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(blocker / "cache"))
    assert jit.compile_kernel(SPEC, ARCH).path.exists()


def test_many_processes_at_once(cache):
    code = (
        "from salekit import jit; c = jit.compile_kernel(jit.KernelSpec('coarsen_mask', ('4',)), 'sm_90a');"
        "import hashlib; print(hashlib.sha256(c.cubin).hexdigest())"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    results = {process.communicate(timeout=120)[0] for process in running}
    assert len(results) == 1 and all(process.returncode == 0 for process in running)
    assert not list(cache.glob(".new-*"))


def test_a_broken_kernel_raises_with_the_log(sources, cache):
    (sources / "kernels" / "broken.cu").write_text("__global__ void broken(float* x) { x[0] = y; }\n")
    with pytest.raises(CompileError, match='identifier "y" is undefined'):
        jit.compile_kernel(KernelSpec("broken"), ARCH)
    with pytest.raises(CompileError, match="missing"):
        jit.compile_kernel(KernelSpec("nowhere"), ARCH)


def test_dynamic_shared_memory_is_read_from_the_module(cache):
    spec = KernelSpec("estimate_int8_sm90", ("64", "128", "false"), "EstimateInt8Storage<64>")
    assert jit.compile_kernel(spec, ARCH).info.dynamic_shared_bytes > 6 * 128 * 64
