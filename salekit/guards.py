"""Guard bands around buffers on the GPU: a debug mode, off unless ``SALEKIT_GUARD=1`` or :func:`switched_on`.

Each buffer that CuPy allocates from :func:`install` on, and each piece of a call's workspace, lies between two bands.
Buffers start as NaN in every float format (bytes of 255), so that what is read before it is written shows in results,
and after each launch of salekit the host waits for it and compares all bands: GpuError names the kernel and the buffer
that it wrote beyond. Nothing can be checked while a stream is captured. Calls take many times as long.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Iterator

import numpy as np

from .errors import GpuError

BAND = 512  # bytes before and after a buffer; a multiple of every alignment
PATTERN = 0xFF
_switched_on = 0
_guarded: "weakref.WeakSet[_Guarded]" = weakref.WeakSet()
_lock = threading.Lock()


def _is_asked_for() -> bool:
    return os.environ.get("SALEKIT_GUARD", "") not in ("", "0")


def is_on() -> bool:
    """Whether what is recorded and allocated from now on has bands."""
    return bool(_switched_on) or _is_asked_for()


@contextmanager
def switched_on() -> Iterator[None]:
    """Buffers that this thread allocates inside have bands, and so have the calls recorded inside by any thread."""
    import cupy

    global _switched_on
    _switched_on += 1
    try:
        with cupy.cuda.using_allocator(allocate):
            yield
    finally:
        _switched_on -= 1


@lru_cache(maxsize=1)
def install() -> None:
    """Make CuPy's allocator of this process one with bands, if that is asked for by ``SALEKIT_GUARD``."""
    if _is_asked_for():
        import cupy

        cupy.cuda.set_allocator(allocate)


class _Guarded:
    """A buffer of CuPy's pool with its bands; what a CuPy array in it keeps alive."""

    def __init__(self, memory: Any, num_bytes: int):
        self.memory, self.num_bytes = memory, num_bytes

    def damage(self) -> str | None:
        return damage(self.memory.ptr, self.memory.ptr + BAND + self.num_bytes, f"a buffer of {self.num_bytes} bytes")


def allocate(num_bytes: int) -> Any:
    """CuPy's allocator: memory of its pool, with bands."""
    import cupy

    memory = cupy.get_default_memory_pool().malloc(num_bytes + 2 * BAND)
    cupy.cuda.runtime.memsetAsync(memory.ptr, PATTERN, num_bytes + 2 * BAND, cupy.cuda.get_current_stream().ptr)
    guarded = _Guarded(memory, num_bytes)
    with _lock:
        _guarded.add(guarded)
    device = cupy.cuda.runtime.getDevice()
    inside = cupy.cuda.UnownedMemory(memory.ptr + BAND, num_bytes, guarded, device)
    return cupy.cuda.MemoryPointer(inside, 0)


def damage(before: int, after: int, name: str) -> str | None:
    """Which of two bands, at these addresses, does not hold the pattern."""
    from cupy.cuda import runtime

    found = np.empty(BAND, np.uint8)
    for address, where in ((before, "before"), (after, "after")):
        runtime.memcpy(found.ctypes.data, address, BAND, runtime.memcpyDeviceToHost)
        changed = np.flatnonzero(found != PATTERN)
        if changed.size:
            byte = changed[0] if where == "after" else BAND - changed[-1]
            return f"{changed.size} bytes {where} {name}, the nearest at {byte}"
    return None


def check(launched: str, stream: int, more: Any = ()) -> None:
    """Wait for the stream; GpuError if a band, of buffers or of ``more`` (arguments of :func:`damage`), was written."""
    from cupy.cuda import runtime

    if stream > 2 and runtime.streamIsCapturing(stream):  # the null stream and its like cannot be
        return
    runtime.streamSynchronize(stream)
    with _lock:
        buffers = list(_guarded)
    for found in (*(buffer.damage() for buffer in buffers), *(damage(*bands) for bands in more)):
        if found:
            raise GpuError(f"{launched} wrote {found}")
