"""Guard bands: where they lie, that writes into them are found, and (on a GPU) that no kernel of salekit makes any."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cupy")

from salekit import guards, programs
from salekit.errors import GpuError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def memory(monkeypatch):
    """Host memory in the place of the GPU's, and copies in that of the runtime's."""
    import ctypes

    from cupy.cuda import runtime

    monkeypatch.setattr(runtime, "memcpy", lambda to, at, size, kind: ctypes.memmove(to, at, size))
    monkeypatch.setattr(runtime, "streamSynchronize", lambda stream: None)
    return np.full(4096, guards.PATTERN, np.uint8)


class HostGpu:
    """A driver whose kernels are Python functions of the addresses they get."""

    def __init__(self, kernels):
        self.kernels = kernels

    @staticmethod
    def fill(address, value, num_bytes, stream):
        import ctypes

        ctypes.memset(address, value, num_bytes)

    def launch(self, function, *rest):
        self.kernels[function]()


def recorded(sizes):
    with programs.Recorder(0) as recorder:
        arrays = [recorder.array((size,), np.uint8) for size in sizes]
        for index, name in enumerate(("first", "second")):
            kernel = type("Kernel", (), {"ptr": index})()
            recorder.launch(kernel, (1,), (1,), 0, tuple(arrays), name)
    return recorder


@pytest.mark.parametrize("where", ("inside", "before", "after", "last"))
def test_a_write_beyond_a_piece_of_workspace_is_found(memory, where):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALEKIT_GUARD", "1")
        program = programs.Program(recorded((100, 512)), [])
    assert program.workspace_bytes <= memory.size
    starts = sorted(x.offset for x in program._guarded)
    assert starts[0] == guards.BAND and starts[1] >= starts[0] + 100 + guards.BAND
    assert all(start % programs.WORKSPACE_ALIGNMENT == 0 for start in starts)
    target = {"inside": starts[0] + 99, "before": starts[0] - 1, "after": starts[0] + 100, "last": starts[1] + 512}

    def overrun():
        memory[target[where]] = 1

    program.link(memory.ctypes.data)
    gpu = HostGpu([lambda: None, overrun])
    if where == "inside":
        program._submit_guarded(gpu, 0)
        return
    with pytest.raises(GpuError, match="second wrote 1 bytes (before|after) a piece of workspace of (100|512) bytes"):
        program._submit_guarded(gpu, 0)


def test_without_the_mode_there_are_no_bands():
    program = programs.Program(recorded((100, 512)), [])
    assert program.workspace_bytes == 1024 and program._guarded is None


@pytest.mark.gpu
def test_a_kernel_that_writes_too_far_is_named():
    import cupy

    source = 'extern "C" __global__ void far(unsigned char* x, int at) { x[at] = 1; }'
    far = cupy.RawKernel(source, "far")
    with guards.switched_on():
        arrays = [cupy.empty(1000, np.uint8) for _ in range(3)]
        for at, where in ((999, None), (1000, "after"), (-1, "before"), (1000 + guards.BAND - 1, "after")):
            far((1,), (1,), (arrays[1], np.int32(at)))
            if where is None:
                guards.check("far", 0)
                continue
            with pytest.raises(GpuError, match=f"far wrote 1 bytes {where} a buffer of 1000 bytes"):
                guards.check("far", 0)
            cupy.cuda.runtime.memset(arrays[1].data.ptr + at, guards.PATTERN, 1)
        assert (arrays[0].get() == 255).all()


@pytest.mark.gpu
def test_no_kernel_writes_into_a_band_or_reads_what_nothing_wrote():
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "SALEKIT_GUARD": "1", "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "bench/memcheck.py", "--few"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "calls" in ran.stdout, ran.stdout + ran.stderr
