"""An executable CUDA graph of a program's operations: one call of the driver launches them all.

A launch costs the host some 2 to 4 us, and as much again for each node whose arguments changed since the last one. The
runtime's graphs are the driver's: CuPy launches them.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import lru_cache
from typing import Any

from .errors import DriverError, GpuError

_POINTER = ctypes.c_void_p


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = [
        ("function", _POINTER),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("params", _POINTER),
        ("extra", _POINTER),
        ("kernel", _POINTER),
        ("context", _POINTER),  # null: the current one
    ]


class _MemsetParams(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("element_bytes", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


@lru_cache(maxsize=None)
def _function(name: str) -> Any:
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            continue
    raise GpuError(f"the NVIDIA driver has no {name}")


def _call(name: str, *args: Any) -> None:
    error = _function(name)(*args)
    if error:
        raise DriverError(name, error)


def stream_priority(stream: int) -> int:
    priority = ctypes.c_int()
    _call("cuStreamGetPriority", _POINTER(stream), ctypes.byref(priority))
    return priority.value


def _destroy(graph: int, executable: int) -> None:
    """Launches in flight go on; the driver frees the rest when they are done."""
    for name, handle in (("cuGraphExecDestroy", executable), ("cuGraphDestroy", graph)):
        if handle:
            _function(name)(_POINTER(handle))


class LaunchGraph:
    """A program's operations, one after another, with the arguments that the program's image held at the last update.

    versions: those of the program's operations at that time.
    """

    def __init__(self, program: Any):
        graph, executable, context = _POINTER(), _POINTER(), _POINTER()
        self.versions: list[int] = list(program.versions)
        nodes: list[tuple] = []
        _call("cuCtxGetCurrent", ctypes.byref(context))
        _call("cuGraphCreate", ctypes.byref(graph), ctypes.c_uint(0))
        try:
            for operation in program.operations:
                node = _POINTER()
                before = (ctypes.byref(nodes[-1][0]), ctypes.c_size_t(1)) if nodes else (None, ctypes.c_size_t(0))
                if hasattr(operation, "params"):
                    params = _kernel_params(operation)
                    _call("cuGraphAddKernelNode_v2", ctypes.byref(node), graph, *before, ctypes.byref(params))
                else:
                    params = _memset_params(operation, program)
                    _call("cuGraphAddMemsetNode", ctypes.byref(node), graph, *before, ctypes.byref(params), context)
                nodes.append((node, operation, params))
            _call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            weakref.finalize(self, _destroy, graph.value, executable.value).atexit = False
        self.executable: int = executable.value
        self._updates = [self._update_of(*node, context) for node in nodes]

    def _update_of(self, node: Any, operation: Any, params: Any, context: Any) -> tuple:
        """(operation, its parameters, the driver's function, the arguments for it)."""
        is_kernel = hasattr(operation, "params")
        function = _function("cuGraphExecKernelNodeSetParams_v2" if is_kernel else "cuGraphExecMemsetNodeSetParams")
        arguments = (self.executable, node.value, ctypes.addressof(params), *(() if is_kernel else (context.value,)))
        function.argtypes = (_POINTER,) * len(arguments)
        return operation, params, function, arguments

    def update(self, program: Any) -> None:
        """Take over the arguments of the operations that changed. Launches in flight keep theirs."""
        for index, version in enumerate(program.versions):
            if version != self.versions[index]:
                operation, params, function, arguments = self._updates[index]
                if isinstance(params, _MemsetParams):
                    params.address = program.address(operation)
                error = function(*arguments)
                if error:
                    raise DriverError("the update of a CUDA graph", error)
                self.versions[index] = version


def _kernel_params(launch: Any) -> _KernelParams:
    grid, block = ((ctypes.c_uint * 3)(*sizes) for sizes in (launch.grid, launch.block))
    return _KernelParams(launch.function, grid, block, launch.shared_bytes, launch.params)


def _memset_params(fill: Any, program: Any) -> _MemsetParams:
    return _MemsetParams(program.address(fill), fill.num_bytes, 0, 1, fill.num_bytes, 1)
