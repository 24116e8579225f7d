"""Arrays: where they are, how those of other libraries come in, memory for the stages, views for kernels.

Accepted: NumPy arrays and host DLPack for the twin; CuPy arrays, CUDA DLPack and ``__cuda_array_interface__`` for the
GPU (docs/embedding.md). Nothing is copied. Inside salekit every tensor is a view in the order [batch, seqlen, heads,
head_dim]; strides say the rest.
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import ml_dtypes
import numpy as np

from . import forks, guards, memory, programs
from .dlpack import import_dlpack
from .errors import ArgumentError, DtypeError, GpuError, SalekitError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPE_NAMES = {np.dtype(np.float16): "float16", BFLOAT16: "bfloat16"}
LAYOUTS = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3)}  # the transpose that makes a view bshd; its own inverse
ALIGNMENT = 16  # bytes a kernel's widest load takes
WORKSPACE_ALIGNMENT = 256  # what every allocator of GPU memory gives at least

# The TensorView struct of cuda_src/tile/tensor_view.cuh; strides count elements.
TENSOR_VIEW = np.dtype([("pointer", "<u8"), ("stride_batch", "<i8"), ("stride_row", "<i8"), ("stride_head", "<i8")])

_DLPACK_HOST, _DLPACK_CUDA = (1, 3), (2, 13)  # DLDeviceType: CPU and pinned; CUDA and managed
_MAX_WORK = 100_000  # candidates that NumPy tries before it is not known whether two views have an element in common
_REFUSED_BY_NUMPY = "DLPack only supports"  # the start of what NumPy's export says of a dtype that DLPack had not
FEWER = "Free memory, or pass fewer rows of q at a time (docs/serving.md) or fewer heads"
_WRITTEN = ("out", "workspace")  # arguments that a call writes to
_IN_JAX = "For jit and shard_map salekit.jax has sparse_attention and dense_attention, nothing else"


def import_cupy():
    """CuPy, or GpuError saying what to install, or that this process cannot use a GPU."""
    if forks.is_dead:
        forks.check()
    try:
        import cupy
    except ImportError as error:
        raise GpuError(f"CuPy is needed for arrays on a GPU: pip install 'salekit[cuda12]' ({error})") from error
    guards.install()
    return cupy


def is_cuda(array: Any) -> bool:
    """Whether an array that salekit holds (NumPy's or CuPy's) is CuPy's."""
    return not isinstance(array, np.ndarray)


def empty(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """GPU memory for a stage, undefined. Stages allocate here or with :func:`zeros` alone (see ``programs``)."""
    recorder = programs.active()
    return recorder.array(shape, dtype) if recorder else allocate(import_cupy().empty, shape, dtype)


def zeros(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """GPU memory for a stage, filled with zeros on the current stream at each call."""
    recorder = programs.active()
    return recorder.zeros(shape, dtype) if recorder else allocate(import_cupy().zeros, shape, dtype)


def allocate(make: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> Any:
    """``make(shape, dtype)``, one of CuPy's, whose error becomes OutOfMemoryError."""
    try:
        return make(shape, dtype)
    except Exception as error:
        if not memory.is_short(error):
            raise
        what = f"an array of shape {tuple(shape)}"
        failure = memory.explained(error, math.prod(shape) * np.dtype(dtype).itemsize, what, FEWER)
    raise failure


def in_layout(array: Any, layout: str) -> Any:
    """A bshd view of an array in ``layout``, and the other way round."""
    return array.transpose(LAYOUTS[layout])


def tensor_view(array: Any) -> np.ndarray:
    """A size-1 ``TENSOR_VIEW`` record of a CuPy bshd view, to pass to a kernel by value."""
    programs.check_symbol(array)
    item = array.dtype.itemsize
    batch, row, head = (stride // item for stride in array.strides[:3])
    return np.array([(array.data.ptr, batch, row, head)], dtype=TENSOR_VIEW)


def row_view(array: Any) -> np.ndarray:
    """The same for kernels that also address absent rows: those lie where an address is aligned."""
    view = tensor_view(array)
    if array.shape[1] == 1:
        view["stride_row"] = 0  # DLPack may give a single row any stride
    return view


# --- memory in common ----------------------------------------------------------------------------------------------
@lru_cache(maxsize=1024)
def reach(shape: tuple[int, ...], strides: tuple[int, ...], item_bytes: int) -> tuple[int, int]:
    """The bytes of such an array, counted from its address: (first, end); (0, 0) when it is empty."""
    if 0 in shape:
        return 0, 0
    steps = [stride * (size - 1) for size, stride in zip(shape, strides)]
    return sum(step for step in steps if step < 0), item_bytes + sum(step for step in steps if step > 0)


def address_of(array: Any) -> int:
    return array.data.ptr if is_cuda(array) else array.ctypes.data


def span(array: Any) -> tuple[int, int]:
    """The addresses that an array's elements lie between."""
    address, (first, end) = address_of(array), reach(array.shape, array.strides, array.dtype.itemsize)
    return address + first, address + end


def have_common_bytes(a: Any, b: Any) -> bool:
    """Whether two arrays, both NumPy's or both CuPy's, certainly share memory. Views that only interleave do not."""
    if is_cuda(a):
        a, b = _placed(a), _placed(b)
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return False


def _placed(array: Any) -> np.ndarray:
    """A NumPy array that lies where a CuPy array does, for questions about where it lies."""
    place = {"shape": array.shape, "strides": array.strides, "data": (array.data.ptr, True)}
    interface = {"version": 3, "typestr": f"|V{array.dtype.itemsize}", **place}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


# --- where arrays are ----------------------------------------------------------------------------------------------
def place_of(name: str, x: Any, wants: str = "a NumPy or CuPy array") -> int | None:
    """CUDA device of ``x``, or None when it is in host memory. DtypeError when it is no array at all.

    wants: what the argument may be besides an array of another library.
    """
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise DtypeError(f"{name}: is a masked array; wants a plain one, such as array.filled(0) makes")
        return None
    if programs.is_gpu_array(x):
        return x.data.device_id
    if problem := _why_without_data(x):
        raise DtypeError(f"{name}: {problem}")
    try:
        place = _exported_place_of(name, x, wants)
    except SalekitError:
        raise
    except Exception as error:  # whatever the producer raises, the caller needs the argument's name
        raise DtypeError(f"{name}: cannot import {type(x).__name__} without a copy: {error}") from error
    return place


def _exported_place_of(name: str, x: Any, wants: str) -> int | None:
    if hasattr(x, "__dlpack_device__") and hasattr(x, "__dlpack__"):
        kind, device = map(int, x.__dlpack_device__())
        if kind in _DLPACK_HOST:
            return None
        if kind in _DLPACK_CUDA:
            return device
        raise ArgumentError(f"{name}: is on a device of DLPack type {kind}; wants host memory or a CUDA GPU")
    if hasattr(x, "__cuda_array_interface__"):
        pointer = x.__cuda_array_interface__["data"][0]
        runtime = import_cupy().cuda.runtime
        return runtime.pointerGetAttributes(pointer).device if pointer else runtime.getDevice()
    raise DtypeError(
        f"{name}: got {type(x).__name__}; wants {wants}, or an object with DLPack or __cuda_array_interface__"
    )


def _why_without_data(x: Any) -> str | None:
    """What is wrong with an object that stands for an array, or None."""
    if _is_tracer(x):
        return f"is traced by JAX and has no data; wants an array. {_IN_JAX}"
    if _is_jax_array(x):
        if x.is_deleted():
            return "is a JAX array that was deleted or donated; wants one that has data"
        if len(x.devices()) > 1:
            return f"is a JAX array on several devices; wants one on one device. {_IN_JAX}"
    if type(x).__name__ == "FakeTensor":
        return "is a FakeTensor, as in torch.compile and torch.export, and has no data; wants a tensor that has"
    if getattr(x, "is_meta", None) is True:
        return "is a tensor on the device 'meta' and has no data; wants one that has"
    return None


def _is_tracer(x: Any) -> bool:
    jax = sys.modules.get("jax")
    return hasattr(jax, "core") and isinstance(x, jax.core.Tracer)


def _is_jax_array(x: Any) -> bool:
    jax = sys.modules.get("jax")
    return hasattr(jax, "Array") and isinstance(x, jax.Array)


def _check_mutable(name: str, x: Any) -> None:
    if _is_jax_array(x):
        raise ArgumentError(f"{name}: is a JAX array, which is immutable; wants memory that can be written")


def place_name(device: int | None) -> str:
    return "host memory" if device is None else f"cuda:{device}"


class _Interface:
    """A CUDA array interface without its stream: CuPy would wait for that stream on the host."""

    def __init__(self, owner: Any, interface: dict):
        self.owner = owner
        self.__cuda_array_interface__ = {**interface, "stream": None}


def as_array(name: str, x: Any, device: int | None) -> Any:
    """``x`` as a NumPy or CuPy array that shares its memory."""
    if isinstance(x, np.ndarray) or programs.is_gpu_array(x):
        return x
    if name in _WRITTEN:
        _check_mutable(name, x)
    try:
        if type(x).__name__ == "StridedMemoryView" and x.dtype == BFLOAT16:
            array, is_read_only = _import_strided_view(x, device), x.readonly
        elif device is None:
            array, is_read_only = import_dlpack(x, np.from_dlpack, name in _WRITTEN)
        elif hasattr(x, "__dlpack__"):
            array, is_read_only = import_dlpack(x, import_cupy().from_dlpack)
        else:
            array, is_read_only = _import_interface(name, x)
    except SalekitError:
        raise
    except Exception as error:
        is_numpy = str(error).startswith(_REFUSED_BY_NUMPY)
        hint = "; NumPy's DLPack has no bfloat16: pass salekit.as_dlpack(array)" if is_numpy else ""
        raise DtypeError(f"{name}: cannot import {type(x).__name__} without a copy: {error}{hint}") from error
    if is_read_only and name in _WRITTEN:
        raise ArgumentError(f"{name}: is read-only; wants memory that can be written")
    return array


def _import_strided_view(view: Any, device: int | None) -> Any:
    """A bfloat16 StridedMemoryView of ``cuda.core``, whose DLPack has no bfloat16."""
    strides = None if view.strides is None else tuple(BFLOAT16.itemsize * stride for stride in view.strides)
    data = (view.ptr, view.readonly)
    holder = _Interface(view, {"version": 3, "shape": view.shape, "typestr": "<u2", "strides": strides, "data": data})
    if device is not None:
        return import_cupy().asarray(holder).view(BFLOAT16)
    holder.__array_interface__ = holder.__cuda_array_interface__
    return np.asarray(holder).view(BFLOAT16)


def _import_interface(name: str, x: Any) -> tuple[Any, bool]:
    """What has a CUDA array interface, as a CuPy array, and whether it is read-only."""
    cupy, interface = import_cupy(), dict(x.__cuda_array_interface__)
    if interface.get("mask") is not None:
        raise DtypeError(f"{name}: has a mask; wants an array without one")
    producer, current = interface.get("stream"), cupy.cuda.get_current_stream()
    if producer is not None and producer != current.ptr:
        event = cupy.cuda.Event(disable_timing=True)
        event.record(external_stream(producer))
        current.wait_event(event)
    is_bfloat16 = interface["typestr"] == BFLOAT16.str
    if is_bfloat16:
        interface.update(typestr="<u2", descr=[("", "<u2")])
    array = cupy.asarray(_Interface(x, interface))
    if is_bfloat16:
        array = array.view(BFLOAT16)
    return array, bool(interface["data"][1])


def import_array(name: str, x: Any, device: int | None) -> Any:
    """``x`` as a NumPy or CuPy array that shares its memory; ArgumentError when it is not on ``device``."""
    place = place_of(name, x)
    if place != device:
        raise ArgumentError(f"{name}: is on {place_name(place)}; wants {place_name(device)}, where q is")
    return as_array(name, x, device)


def on_device(device: int | None, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """These arguments as NumPy arrays (device None) or CuPy arrays of one device that share their memory."""
    array = np.ndarray if device is None else import_cupy().ndarray
    if type(q) is type(k) is type(v) is array:
        if device is None or q.data.device_id == k.data.device_id == v.data.device_id == device:
            return q, k, v
    return tuple(import_array(name, x, device) for name, x in (("q", q), ("k", k), ("v", v)))


class _StreamHandle:
    def __init__(self, pointer: int):
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.pointer)


def external_stream(pointer: int) -> Any:
    """A CuPy stream for a ``cudaStream_t`` that something else owns."""
    stream = import_cupy().cuda.Stream
    if hasattr(stream, "from_external"):
        return stream.from_external(_StreamHandle(pointer))
    return import_cupy().cuda.ExternalStream(pointer)


def _as_stream(stream: Any, device: int) -> Any:
    cupy = import_cupy()
    if isinstance(stream, cupy.cuda.Stream):
        if stream.device_id not in (-1, device):
            raise ArgumentError(f"stream: belongs to cuda:{stream.device_id}; wants one of cuda:{device}, where q is")
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return external_stream(int(stream.__cuda_stream__()[1]))
    for attribute in ("cuda_stream", "ptr"):
        if isinstance(getattr(stream, attribute, None), int):
            return external_stream(getattr(stream, attribute))
    if isinstance(stream, (int, np.integer)) and not isinstance(stream, bool) and stream >= 0:
        return external_stream(int(stream))
    wants = "a cudaStream_t as int, a CuPy stream, an object with __cuda_stream__ or cuda_stream, or None (current)"
    raise ArgumentError(f"stream: got {stream!r}; wants {wants}")


def on_stream(q: Any, stream: Any, name: str = "q") -> AbstractContextManager[int | None]:
    """Makes q's device and ``stream`` current and gives the device; None for host memory, which takes no stream."""
    device = place_of(name, q)
    if device is None:
        if stream is not None:
            raise ArgumentError(f"stream: {name} is in host memory, where there is no stream; wants None")
        return nullcontext(None)
    if stream is None and import_cupy().cuda.runtime.getDevice() == device:
        return nullcontext(device)
    return _switch(device, stream)


@contextmanager
def _switch(device: int, stream: Any) -> Iterator[int]:
    with ExitStack() as stack:
        with memory.for_a_context(device):
            stack.enter_context(import_cupy().cuda.Device(device))
        if stream is not None:
            stack.enter_context(_as_stream(stream, device))
        yield device
