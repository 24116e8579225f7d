"""Arrays and options in: the only place that rejects. Everything downstream gets checked views and a Plan.

Accepted: NumPy arrays and host DLPack for the twin; CuPy arrays, CUDA DLPack and ``__cuda_array_interface__`` for the
GPU (docs/embedding.md). Nothing is copied. Inside salekit every tensor is a view in the order [batch, seqlen, heads,
head_dim]; strides say the rest.
"""

from __future__ import annotations

import math
import operator
import reprlib
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any, Callable, Iterator

import ml_dtypes
import numpy as np

from . import forks, guards, memory, programs
from .dlpack import import_dlpack
from .errors import ArgumentError, DtypeError, GpuError, SalekitError
from .plans import (
    BLOCKS,
    DENSE_BELOW,
    ESTIMATORS,
    HEAD_DIMS,
    LOW_BIT_ARCHS,
    LOW_BIT_HEAD_DIMS,
    POOLED_HEAD_DIMS,
    QUERY_STRIDES,
    SKIPPED,
    Plan,
    default_softmax_scale,
    resolve_estimator,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPE_NAMES = {np.dtype(np.float16): "float16", BFLOAT16: "bfloat16"}
LAYOUTS = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3)}  # the transpose that makes a view bshd; its own inverse
MAX_SEQLEN = 2**30  # positions, and sums of two of them, are int32 in the kernels
MAX_GRID = 65535  # batch and heads are the y and z of a CUDA grid
ALIGNMENT = 16  # bytes a kernel's widest load takes
WORKSPACE_ALIGNMENT = 256  # what every allocator of GPU memory gives at least

# The TensorView struct of cuda_src/tile/tensor_view.cuh; strides count elements.
TENSOR_VIEW = np.dtype([("pointer", "<u8"), ("stride_batch", "<i8"), ("stride_row", "<i8"), ("stride_head", "<i8")])

_DLPACK_HOST, _DLPACK_CUDA = (1, 3), (2, 13)  # DLDeviceType: CPU and pinned; CUDA and managed
FEWER = "Free memory, or pass fewer rows of q at a time (docs/serving.md) or fewer heads"
_WRITTEN = ("out", "workspace")  # arguments that a call writes to


@dataclass(frozen=True)
class Call:
    """A checked call. q, k, v, out: bshd views; result: what the caller gets back, in the caller's layout."""

    plan: Plan
    q: Any
    k: Any
    v: Any
    out: Any
    result: Any
    thresholds: Any  # a float, or float32 [num_heads] where q is
    sink_logits: Any  # None, or float32 [num_heads] on the host or where q is


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


# --- where arrays are ----------------------------------------------------------------------------------------------
def _place(name: str, x: Any) -> int | None:
    """CUDA device of ``x``, or None when it is in host memory. DtypeError when it is no array at all."""
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise DtypeError(f"{name}: is a masked array; wants a plain one, such as array.filled(0) makes")
        return None
    if programs.is_gpu_array(x):
        return x.data.device_id
    if problem := _why_without_data(x):
        raise DtypeError(f"{name}: {problem}")
    try:
        place = _exported_place(name, x)
    except SalekitError:
        raise
    except Exception as error:  # whatever the producer raises, the caller needs the argument's name
        raise DtypeError(f"{name}: cannot import {type(x).__name__} without a copy: {error}") from error
    return place


def _exported_place(name: str, x: Any) -> int | None:
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
        f"{name}: got {type(x).__name__}; wants a NumPy or CuPy array, or an object with DLPack or "
        "__cuda_array_interface__"
    )


def _why_without_data(x: Any) -> str | None:
    """What is wrong with an object that stands for an array, or None."""
    if _is_tracer(x):
        return "is traced by JAX and has no data; wants an array. Under jit, use salekit.jax"
    if _is_jax_array(x):
        if x.is_deleted():
            return "is a JAX array that was deleted or donated; wants one that has data"
        if len(x.devices()) > 1:
            return "is a JAX array on several devices; wants one on one device. Use salekit.jax in a shard_map"
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


def _import_array(name: str, x: Any, device: int | None) -> Any:
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
        hint = "; NumPy's DLPack has no bfloat16: pass salekit.as_dlpack(array)" if device is None else ""
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
    place = _place(name, x)
    if place != device:
        raise ArgumentError(f"{name}: is on {place_name(place)}; wants {place_name(device)}, where q is")
    return _import_array(name, x, device)


def on_device(device: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """These arguments as CuPy arrays of one device that share their memory."""
    array = import_cupy().ndarray
    if type(q) is type(k) is type(v) is array and q.data.device_id == k.data.device_id == v.data.device_id == device:
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
    raise ArgumentError(f"stream: got {stream!r}; wants a cudaStream_t as int, a CuPy stream, or None (current)")


def on_stream(q: Any, stream: Any, name: str = "q") -> AbstractContextManager[int | None]:
    """Makes q's device and ``stream`` current and gives the device; None for host memory, which takes no stream."""
    device = _place(name, q)
    if device is None:
        if stream is not None:
            raise ArgumentError(f"stream: {name} is in host memory, where there is no stream; wants None")
        return nullcontext(None)
    if stream is None and import_cupy().cuda.runtime.getDevice() == device:
        return nullcontext(device)
    return _switch(device, stream)


@contextmanager
def _switch(device: int, stream: Any) -> Iterator[int]:
    with import_cupy().cuda.Device(device):
        if stream is None:
            yield device
        else:
            with _as_stream(stream, device):
                yield device


# --- tensors -------------------------------------------------------------------------------------------------------
def _check_tensor(name: str, x: Any, device: int | None, layout: str) -> Any:
    """``x`` as a checked bshd view."""
    array = import_array(name, x, device)
    if array.ndim != 4:
        raise ArgumentError(f"{name}: got {array.ndim} axes, shape {array.shape}; wants 4 axes, layout {layout!r}")
    if array.dtype not in DTYPE_NAMES:
        raise DtypeError(f"{name}: got dtype {array.dtype}; wants float16 or bfloat16 (ml_dtypes.bfloat16)")
    return in_layout(array, layout)


def _check_strides(name: str, array: Any, is_output: bool = False) -> None:
    if array.size == 0:
        return
    item = array.dtype.itemsize
    if array.strides[3] != item:
        raise ArgumentError(
            f"{name}: the last axis has a stride of {array.strides[3] / item:g} elements; wants 1 (contiguous)"
        )
    used = [stride for size, stride in zip(array.shape[:3], array.strides[:3]) if size > 1]
    if is_output and any(stride <= 0 for stride in used):
        raise ArgumentError(f"{name}: has a zero or negative stride; wants memory of its own for each element")
    if is_cuda(array):
        pointer = array.data.ptr
        if pointer % ALIGNMENT or any(stride % ALIGNMENT for stride in used):
            raise ArgumentError(
                f"{name}: got an address that is {pointer % ALIGNMENT} past a multiple of 16 bytes and strides "
                f"{tuple(stride // item for stride in array.strides)}; wants a 16-byte aligned address and strides "
                "that are multiples of 8 elements"
            )


def check_view(name: str, x: Any, device: int | None, layout: str = "bshd") -> Any:
    """One tensor as a bshd view, its axes, dtype, place, address and strides checked; its sizes are the caller's."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ArgumentError(f"layout: got {layout!r}; wants one of {', '.join(map(repr, LAYOUTS))}")
    view = _check_tensor(name, x, device, layout)
    _check_strides(name, view)
    return view


def as_arrays(q: Any, k: Any, v: Any, layout: str = "bshd") -> tuple[Any, Any, Any]:
    """Checked bshd views of q, k and v, all NumPy's or all CuPy's on one device.

    q: [batch, seqlen_q, num_heads, head_dim]; k, v: [batch, seqlen_k, num_kv_heads, head_dim] (in "bhsd" with the
    middle axes swapped), float16 or bfloat16. Raises ArgumentError or DtypeError.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ArgumentError(f"layout: got {layout!r}; wants one of {', '.join(map(repr, LAYOUTS))}")
    device = _place("q", q)
    q, k, v = (_check_tensor(name, x, device, layout) for name, x in (("q", q), ("k", k), ("v", v)))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise DtypeError(f"{name}: got dtype {x.dtype}; wants {q.dtype}, as q has")
    batch, seqlen_q, num_heads, head_dim = q.shape
    _, seqlen_k, num_kv_heads, _ = k.shape
    if head_dim not in HEAD_DIMS:
        raise ArgumentError(f"q: got head_dim {head_dim}; wants one of {', '.join(map(str, HEAD_DIMS))}")
    if k.shape[0] != batch:
        raise ArgumentError(f"k: got batch {k.shape[0]}; wants {batch}, as q has")
    if k.shape[3] != head_dim:
        raise ArgumentError(f"k: got head_dim {k.shape[3]}; wants {head_dim}, as q has")
    for name, got, want in zip(("batch", "seqlen", "num_kv_heads", "head_dim"), v.shape, k.shape):
        if got != want:
            raise ArgumentError(f"v: got {name} {got}; wants {want}, as k has")
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ArgumentError(
            f"k: got {num_kv_heads} heads for the {num_heads} of q; wants a positive number that divides them"
        )
    for name, length in (("q", seqlen_q), ("k", seqlen_k)):
        if length > MAX_SEQLEN:
            raise ArgumentError(f"{name}: got seqlen {length}; wants at most {MAX_SEQLEN}")
    if device is not None and max(batch, num_heads) > MAX_GRID:
        raise ArgumentError(f"q: got batch {batch} and {num_heads} heads; wants at most {MAX_GRID} of each")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_strides(name, x)
    return q, k, v


# --- shapes --------------------------------------------------------------------------------------------------------
def stand_in(shape: tuple[int, ...], dtype: np.dtype, device: int | None) -> Any:
    """A contiguous array for the checks, which read none: NumPy's with memory for one element, CuPy's with none."""
    if device is not None:
        memory = import_cupy().cuda.UnownedMemory(WORKSPACE_ALIGNMENT, math.prod(shape) * dtype.itemsize, None, device)
        return import_cupy().ndarray(shape, dtype, import_cupy().cuda.MemoryPointer(memory, 0))
    strides = np.cumprod((dtype.itemsize, *shape[:0:-1]), dtype=np.int64)[::-1] if shape else ()
    return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, strides, writeable=False)


def examples(q: Any, k: Any, v: Any, dtype: Any, device: int | None) -> tuple[Any, Any, Any]:
    """q, k and v as they are when they are arrays, stand-ins of ``dtype`` on ``device`` when they are shapes."""
    named = tuple(zip("qkv", (q, k, v)))
    if not any(isinstance(x, (tuple, list)) for _, x in named):
        for name, value in (("dtype", dtype), ("device", device)):
            if value is not None:
                raise ArgumentError(f"{name}: got {value!r}; wants None, as q, k and v are arrays, which have one")
        return q, k, v
    for name, x in named:
        if not isinstance(x, (tuple, list)):
            raise ArgumentError(f"{name}: got {type(x).__name__}; wants a shape, as others of q, k and v are shapes")
        if not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0 for n in x):
            raise ArgumentError(f"{name}: got {reprlib.repr(x)[:60]}; wants an array or a shape, integers >= 0")
        if math.prod(map(int, x)) >= 2**60:
            raise ArgumentError(f"{name}: got shape {reprlib.repr(x)}; wants one of fewer than 2**60 elements")
    dtype, device = _check_dtype(dtype), None if device is None else _check_device(device)
    return tuple(stand_in(tuple(map(int, x)), dtype, device) for _, x in named)


def _check_dtype(dtype: Any) -> np.dtype:
    by_name = {name: known for known, name in DTYPE_NAMES.items()}
    try:
        found = by_name.get(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    except TypeError:
        found = None
    if found not in DTYPE_NAMES:
        wanted = " or ".join(map(repr, by_name))
        raise DtypeError(f"dtype: got {dtype!r}; wants {wanted}, as q, k and v are shapes")
    return found


def _check_device(device: Any) -> int:
    if not isinstance(device, (int, np.integer)) or isinstance(device, bool):
        raise ArgumentError(f"device: got {device!r}; wants the number of a CUDA device, or None for host memory")
    runtime = import_cupy().cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise GpuError(f"device: got {device}, but no GPU can be used: {error}") from error
    if not 0 <= device < count:
        raise ArgumentError(f"device: got {device}; wants 0 to {count - 1}, the CUDA devices that there are, or None")
    return int(device)


# --- options -------------------------------------------------------------------------------------------------------
def _check_count(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0 or isinstance(value, bool):
        raise ArgumentError(f"{name}: got {value!r}; wants an integer >= 0")
    return min(count, MAX_SEQLEN)


def _check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}: got {value!r}; wants True or False")
    return bool(value)


check_count, check_flag = _check_count, _check_flag  # for options that are no part of a Plan


def _check_choice(name: str, value: Any, choices: tuple) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ArgumentError(f"{name}: got {value!r}; wants one of {', '.join(map(repr, choices))}")
    return value


def _check_scale(value: Any, head_dim: int) -> float:
    if value is None:
        return default_softmax_scale(head_dim)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ArgumentError(f"softmax_scale: got {value!r}; wants a finite number > 0 or None")
    scale = float(value)
    # Kernels hold it in float32: it must survive the cast.
    if not (math.isfinite(scale) and 1e-37 <= scale <= 1e37):
        raise ArgumentError(f"softmax_scale: got {value!r}; wants a finite number > 0 (1e-37 to 1e37)")
    return scale


def _check_block(block: Any) -> tuple[int, int]:
    try:
        pair = tuple(operator.index(size) for size in block)
    except TypeError:
        pair = ()
    if pair not in BLOCKS:
        raise ArgumentError(f"block: got {block!r}; wants one of {', '.join(map(str, BLOCKS))}")
    return pair


def _check_softcap(value: Any, scale: float) -> float:
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"softcap: got {value!r}; wants a finite number >= 0")
    cap = float(value)
    # Kernels hold it and softmax_scale / softcap in float32.
    if cap != 0 and not (1e-37 <= cap <= 1e37 and 1e-37 <= scale / cap <= 1e37):
        raise ArgumentError(
            f"softcap: got {value!r}; wants 0 (off) or a finite number > 0 (1e-37 to 1e37, as softmax_scale / softcap)"
        )
    return cap


def _check_window(window: Any, causal: bool, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """(left, right) as a Plan holds them: -1 where the window hides nothing that ``causal`` does not."""
    if window is None:
        return -1, -1
    if isinstance(window, (int, np.integer)) and not isinstance(window, bool) and window >= 1:
        sides = (int(window) - 1,) * 2  # the row's own key is one of them
    else:
        try:
            sides = tuple(-2 if isinstance(side, (bool, np.bool_)) else operator.index(side) for side in window)
        except TypeError:
            sides = ()
    if len(sides) != 2 or min(sides) < -1:
        raise ArgumentError(
            f"window_size: got {window!r}; wants None, an integer >= 1 or a pair (left, right) of integers >= -1"
        )
    left, right = sides
    return (
        left if left < seqlen_k - 1 else -1,
        right if not causal and right < seqlen_q - 1 else -1,
    )


def check_sink_logits(sink_logits: Any, plan: Plan, q: Any) -> Any:
    """None, or float32 [num_heads] on the host or where ``q`` (a checked array) is.

    Host values are finite or -inf (a head without a sink). An array on the GPU is not read: +inf and NaN there make NaN
    of the head's output. Raises ArgumentError, DtypeError.
    """
    if sink_logits is None:
        return None
    if plan.attend != "exact":
        raise ArgumentError(f"sink_logits: attend={plan.attend!r} takes none; wants attend='exact'")
    if plan.skipped != "drop":
        raise ArgumentError(f"sink_logits: skipped={plan.skipped!r} takes none; wants skipped='drop'")
    if isinstance(sink_logits, (list, tuple)):
        try:
            sink_logits = np.array(sink_logits)
        except ValueError:
            raise ArgumentError(f"sink_logits: got a ragged list; wants {plan.num_heads} numbers, one a head") from None
    place, want = _place("sink_logits", sink_logits), q.device.id if is_cuda(q) else None
    if place not in (None, want):
        wants = "host memory" if want is None else f"{place_name(want)} or host memory"
        raise ArgumentError(f"sink_logits: is on {place_name(place)}; wants {wants}")
    values = _import_array("sink_logits", sink_logits, place)
    is_real = values.dtype.kind in "fiu" or values.dtype.name == "bfloat16"
    if not is_real or (place is not None and values.dtype != np.float32):
        wants = "real numbers" if place is None else "float32 on the GPU"
        raise DtypeError(f"sink_logits: got dtype {values.dtype}; wants {wants}")
    if values.shape != (plan.num_heads,):
        raise ArgumentError(f"sink_logits: got shape {values.shape}; wants ({plan.num_heads},), one a head")
    if place is not None:
        if not values.flags.c_contiguous:
            raise ArgumentError("sink_logits: is not contiguous; wants a contiguous array on the GPU")
        return values
    with np.errstate(over="ignore"):
        values = np.array(values, np.float32)  # a copy: programs keep it
    if np.isnan(values).any() or np.isposinf(values).any():
        raise ArgumentError("sink_logits: has a NaN or +inf; wants numbers that are finite in float32, or -inf")
    return values


def plan_of_views(
    q: Any,
    k: Any,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    estimator: str = "auto",
    attend: str = "exact",
    block: tuple[int, int] = (128, 32),
    query_stride: int = 1,
    full_rows: int = 1024,
    sink: int = 32,
    local: int = 128,
    dense_below: int = DENSE_BELOW,
    skipped: str = "drop",
    softcap: float = 0.0,
    window_size: int | tuple[int, int] | None = None,
    longest: tuple[int, int] | None = None,
) -> Plan:
    """The Plan of checked bshd views. longest: (seqlen_q, seqlen_k) where the views hold sequences of up to that."""
    _check_choice("estimator", estimator, ("auto", *ESTIMATORS))
    _check_choice("attend", attend, ("exact", "int8-fp8"))
    _check_choice("skipped", skipped, SKIPPED)
    block_q, block_k = _check_block(block)
    stride = _check_count("query_stride", query_stride)
    _check_choice("query_stride", stride, QUERY_STRIDES)
    arch = None
    if is_cuda(q):
        from .jit import device_arch

        arch = device_arch()
        if attend == "int8-fp8" and arch not in LOW_BIT_ARCHS:
            wanted = ", ".join(LOW_BIT_ARCHS)
            raise ArgumentError(f"attend: 'int8-fp8' is built for {wanted} alone, this GPU is {arch}; wants 'exact'")
    batch, _, num_heads, head_dim = q.shape
    seqlen_q, seqlen_k = longest or (q.shape[1], k.shape[1])
    causal, scale = _check_flag("causal", causal), _check_scale(softmax_scale, head_dim)
    softcap = _check_softcap(softcap, scale)
    window_left, window_right = _check_window(window_size, causal, seqlen_q, seqlen_k)
    if attend == "int8-fp8" and head_dim not in LOW_BIT_HEAD_DIMS:
        wanted = " and ".join(map(str, LOW_BIT_HEAD_DIMS))
        raise ArgumentError(f"attend: 'int8-fp8' takes head_dim {wanted}, q has {head_dim}; wants 'exact'")
    if attend == "int8-fp8" and (softcap or window_left >= 0 or window_right >= 0):
        raise ArgumentError("attend: 'int8-fp8' has no softcap and no window_size; wants 'exact'")
    if skipped == "pool" and head_dim not in POOLED_HEAD_DIMS:
        wanted = " and ".join(map(str, POOLED_HEAD_DIMS))
        raise ArgumentError(f"skipped: 'pool' takes head_dim {wanted}, q has {head_dim}; wants 'drop'")
    if skipped == "pool" and (softcap or window_left >= 0 or window_right >= 0):
        raise ArgumentError("skipped: 'pool' has no softcap and no window_size; wants 'drop'")
    return Plan(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=num_heads,
        num_kv_heads=k.shape[2],
        head_dim=head_dim,
        dtype=DTYPE_NAMES[q.dtype],
        estimator=resolve_estimator(estimator, arch),
        attend=attend,
        block_q=block_q,
        block_k=block_k,
        query_stride=stride,
        arch=arch,
        causal=causal,
        softmax_scale=scale,
        full_rows=_check_count("full_rows", full_rows),
        sink=_check_count("sink", sink),
        local=_check_count("local", local),
        dense_below=_check_count("dense_below", dense_below),
        skipped=skipped,
        softcap=softcap,
        window_left=window_left,
        window_right=window_right,
    )


def make_plan(q: Any, k: Any, v: Any, *, layout: str = "bshd", **options: Any) -> Plan:
    """The Plan of a call, for the stages.

    q, k, v, layout and options (causal, softmax_scale, estimator, attend, block, query_stride, full_rows, sink, local,
    dense_below, skipped, softcap, window_size) are those of ``sparse_attention``, checked in the same way. Raises
    ArgumentError, DtypeError; GpuError for a GPU that no kernel supports.
    """
    with on_stream(q, None):
        q, k, v = as_arrays(q, k, v, layout)
        return plan_of_views(q, k, **options)


def check_out(out: Any, q: Any, layout: str) -> Any:
    """``out``, in ``layout``, as a bshd view like q, which is one."""
    view = _check_tensor("out", out, q.device.id if is_cuda(q) else None, layout)
    order = LAYOUTS[layout]
    if view.shape != q.shape:
        got, want = (tuple(x.shape[axis] for axis in order) for x in (view, q))
        raise ArgumentError(f"out: got shape {got}; wants {want}, as q has")
    if view.dtype != q.dtype:
        raise DtypeError(f"out: got dtype {view.dtype}; wants {q.dtype}, as q has")
    _check_strides("out", view, is_output=True)
    if not is_cuda(view) and not view.flags.writeable:
        raise ArgumentError("out: is read-only; wants memory that can be written")
    return view


def check_workspace(workspace: Any, device: int, num_bytes: int) -> Any:
    """``workspace`` as a CuPy array of at least ``num_bytes`` contiguous, aligned bytes."""
    array = import_array("workspace", workspace, device)
    if not array.flags.c_contiguous:
        raise ArgumentError("workspace: is not contiguous; wants contiguous memory")
    if array.nbytes < num_bytes:
        raise ArgumentError(f"workspace: got {array.nbytes} bytes; wants at least {num_bytes}")
    if array.nbytes and array.data.ptr % WORKSPACE_ALIGNMENT:
        past = array.data.ptr % WORKSPACE_ALIGNMENT
        raise ArgumentError(
            f"workspace: got an address {past} past a multiple of {WORKSPACE_ALIGNMENT}; wants an aligned one"
        )
    return array


def check_call(
    q: Any, k: Any, v: Any, *, layout: str, out: Any, thresholds: Any = 0.0, sink_logits: Any = None, **options: Any
) -> Call:
    """Check a whole call inside ``on_stream`` and allocate its output when none is given."""
    from .thresholds import as_thresholds

    q, k, v = as_arrays(q, k, v, layout)
    plan = plan_of_views(q, k, **options)
    thresholds = as_thresholds(thresholds, plan.num_heads, q)
    sink_logits = check_sink_logits(sink_logits, plan, q)
    order = LAYOUTS[layout]
    if out is None:
        allocate = import_cupy().empty if is_cuda(q) else np.empty
        result = allocate(tuple(q.shape[axis] for axis in order), q.dtype)
        view = in_layout(result, layout)
    else:
        result, view = out, check_out(out, q, layout)
    return Call(
        plan=plan, q=q, k=k, v=v, out=view, result=result, thresholds=thresholds, sink_logits=sink_logits
    )


def empty_attention(out: Any, plan: Plan, sink_logits: Any = None) -> Any:
    """The lse of a call without a query row or without a key; ``out``, a bshd view, is zeroed.

    It is minus infinity, or the sink logits (of the host).
    """
    lse = np.full((plan.batch, plan.num_heads, plan.seqlen_q), -np.inf, np.float32)
    if sink_logits is not None:
        lse[...] = sink_logits[:, None]
    if not is_cuda(out):
        out[...] = 0
        return lse
    cupy = import_cupy()
    if out.size:
        # Row by row copies, because CuPy's own fill of a strided view is a kernel that needs the CUDA headers.
        zero_rows = cupy.zeros((plan.seqlen_q, plan.head_dim), out.dtype)
        width = plan.head_dim * out.dtype.itemsize
        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream().ptr
        for batch in range(plan.batch):
            for head in range(plan.num_heads):
                rows = out[batch, :, head]
                pitch = rows.strides[0] if plan.seqlen_q > 1 else width
                runtime.memcpy2DAsync(
                    rows.data.ptr,
                    pitch,
                    zero_rows.data.ptr,
                    width,
                    width,
                    plan.seqlen_q,
                    runtime.memcpyDeviceToDevice,
                    stream,
                )
    return cupy.asarray(lse)
