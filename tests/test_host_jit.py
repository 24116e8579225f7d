"""Compiling: cache hits, what a key follows, and what the compiler reports. Needs NVRTC, no GPU."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("cupy")

from salekit import jit  # noqa: E402
from salekit.errors import CompileError, GpuError  # noqa: E402
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


def test_a_broken_kernel_raises_with_the_log(sources, cache):
    (sources / "kernels" / "broken.cu").write_text("__global__ void broken(float* x) { x[0] = y; }\n")
    with pytest.raises(CompileError, match='identifier "y" is undefined'):
        jit.compile_kernel(KernelSpec("broken"), ARCH)
    with pytest.raises(CompileError, match="missing"):
        jit.compile_kernel(KernelSpec("nowhere"), ARCH)


def test_dynamic_shared_memory_is_read_from_the_module(cache):
    spec = KernelSpec("estimate_int8_sm90", ("64", "128", "false"), "EstimateInt8Storage<64>")
    assert jit.compile_kernel(spec, ARCH).info.dynamic_shared_bytes > 6 * 128 * 64


def test_architectures():
    """Code of other GPUs runs on none of Jetson's (8.7), and code for sm_100a, 103a, 120a on no other."""
    from salekit.plans import SUPPORTED_ARCHS, arch_of

    found = {(major, minor): arch_of(major, minor) for major in range(7, 13) for minor in range(10)}
    assert [arch for arch in found.values() if arch] == list(SUPPORTED_ARCHS)
    assert (found[8, 0], found[8, 7], found[9, 0], found[12, 1]) == ("sm_80", "sm_87", "sm_90a", "sm_121a")


def test_a_gpu_without_kernels(monkeypatch):
    cupy = pytest.importorskip("cupy")
    from types import SimpleNamespace

    monkeypatch.setattr(cupy.cuda, "Device", lambda device: SimpleNamespace(compute_capability="75"))
    jit._arch_of_device.cache_clear()
    with pytest.raises(GpuError, match=r"GPU 3 has compute capability 7.5; salekit has kernels for 8.0, 8.6, .*12.1$"):
        jit._arch_of_device(3)


def test_threads_load_a_kernel_once(cache, monkeypatch):
    import cupy

    class Slow:
        def __init__(self, compiled, name):
            loads.append(name)
            time.sleep(0.05)

    loads: list[str] = []
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(jit, "Kernel", Slow)
    monkeypatch.setattr(jit, "_loaded", {})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: jit.get_kernel(SPEC, ARCH), range(8)))
    assert loads == [SPEC.label] and all(kernel is found[0] for kernel in found)
