"""Workspace: the memory that calls use between their stages, one piece a stream, kept from call to call.

Calls on one stream run one after another, so they share one piece, as large as the largest of them needs. A call that
is captured into a CUDA graph gets memory that the graph itself owns: an allocation and a release captured with its
launches.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Callable, Generic, Hashable, TypeVar

MAX_WORKSPACES = 16  # streams that keep one; the one used longest ago goes first
_LEGACY_STREAMS = (0, 1)  # the null stream and cudaStreamLegacy: one stream, which cannot be captured
_THREAD_STREAM = 2  # cudaStreamPerThread: another stream in each thread

Value = TypeVar("Value")


class RecentlyUsed(Generic[Value]):
    """A dictionary of at most ``size`` entries that forgets the one used longest ago; for any number of threads."""

    def __init__(self, size: int):
        self._size = size
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._newest: Value | None = None
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        value = self._entries.get(key)
        if value is not None and value is not self._newest:
            with self._lock:
                if key in self._entries:
                    self._entries.move_to_end(key)
                    self._newest = value
        return value

    def add(self, key: Hashable, value: Value) -> Value:
        """The entry of ``key``, which is ``value`` unless another thread was first."""
        with self._lock:
            value = self._entries.setdefault(key, value)
            self._entries.move_to_end(key)
            self._newest = value
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
            return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._newest = None

    def values(self) -> list[Value]:
        with self._lock:
            return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)


class Workspace:
    """The workspace of one stream. Hold ``lock`` from :meth:`reserve` until the last launch that uses it is queued."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._memory: Any = None
        self._address = 0
        self._num_bytes = 0

    def reserve(self, num_bytes: int, allocate: Callable[[int], Any]) -> int:
        """The address of at least ``num_bytes``; ``allocate`` gives an object with ``data.ptr`` on the current stream.

        What was there before is gone. Memory goes back to the pool it came from, which hands it out on the same stream
        alone: launches that are still queued keep it to themselves.
        """
        if num_bytes > self._num_bytes:
            self.clear()
            memory = allocate(num_bytes)
            self._memory, self._address, self._num_bytes = memory, memory.data.ptr, num_bytes
        return self._address

    def clear(self) -> None:
        self._memory, self._address, self._num_bytes = None, 0, 0


_workspaces: RecentlyUsed[Workspace] = RecentlyUsed(MAX_WORKSPACES)


def of_stream(device: int, stream: int) -> Workspace:
    """The workspace of a stream (a ``cudaStream_t``) of a device."""
    if stream == _THREAD_STREAM:
        key = (device, stream, threading.get_ident())
    else:
        key = (device, 0 if stream in _LEGACY_STREAMS else stream)
    return _workspaces.get(key) or _workspaces.add(key, Workspace())


def use(device: int, stream: int, is_captured: bool, num_bytes: int, given: Any, launch: Callable[[int], None]) -> None:
    """``launch(address of num_bytes)``, for launches on ``stream``, the current one of the current ``device``.

    given: a CuPy array to use, or None. is_captured: the stream is in capture mode; the graph shall own the memory.
    """
    if num_bytes == 0:
        launch(0)
    elif given is not None:
        launch(given.data.ptr)
    elif is_captured:
        import cupy

        address = cupy.cuda.runtime.mallocAsync(num_bytes, stream)
        try:
            launch(address)
        finally:
            cupy.cuda.runtime.freeAsync(address, stream)
    else:
        workspace = of_stream(device, stream)
        with workspace.lock:
            launch(workspace.reserve(num_bytes, allocate))


def is_capturing(stream: int) -> bool:
    """Whether a stream is in capture mode. The null stream cannot be, and asking it may disturb another's capture."""
    if stream in _LEGACY_STREAMS:
        return False
    import cupy

    return cupy.cuda.runtime.streamIsCapturing(stream)


def allocate(num_bytes: int) -> Any:
    """Memory of CuPy's pool for the current stream."""
    import cupy

    return cupy.empty(num_bytes, "u1")


def clear_workspaces() -> None:
    """Give the workspaces that salekit keeps, one for each stream of each GPU, back to CuPy's memory pool.

    The next call of a stream allocates one again. CUDA graphs are not affected: they own their workspace. Memory that
    the pool holds goes back to the GPU with ``cupy.get_default_memory_pool().free_all_blocks()``.
    """
    for workspace in _workspaces.values():
        with workspace.lock:
            workspace.clear()
    _workspaces.clear()
