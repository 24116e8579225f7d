"""Arguments in: the only place that rejects. Everything downstream gets checked views and a Plan."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arrays
from .errors import ArgumentError, DtypeError, GpuError
from .options import check_names, plan_of_views
from .plans import HEAD_DIMS, MAX_GRID, MAX_SEQLEN, Plan
from .thresholds import as_thresholds


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


# --- tensors -------------------------------------------------------------------------------------------------------
def _check_tensor(name: str, x: Any, device: int | None, layout: str) -> Any:
    """``x`` as a checked bshd view."""
    array = arrays.import_array(name, x, device)
    if array.ndim != 4:
        raise ArgumentError(f"{name}: got {array.ndim} axes, shape {array.shape}; wants 4 axes, layout {layout!r}")
    if array.dtype not in arrays.DTYPE_NAMES:
        raise DtypeError(f"{name}: got dtype {array.dtype}; wants float16 or bfloat16 (ml_dtypes.bfloat16)")
    return arrays.in_layout(array, layout)


def _check_strides(name: str, array: Any, is_output: bool = False) -> None:
    if array.size == 0:
        return
    item = array.dtype.itemsize
    if array.strides[3] != item:
        raise ArgumentError(
            f"{name}: the last axis has a stride of {array.strides[3] / item:g} elements; wants 1 (contiguous)"
        )
    axes = [(stride, size) for size, stride in zip(array.shape[:3], array.strides[:3]) if size > 1]
    used = [stride for stride, _ in axes]
    if is_output:
        if min(used, default=1) <= 0:
            raise ArgumentError(f"{name}: has a zero or negative stride; wants memory of its own for each element")
        extent = item * array.shape[3]
        for stride, size in sorted(axes):
            if stride < extent:
                raise ArgumentError(
                    f"{name}: has a stride of {stride // item} elements, the axes inside it take {extent // item}; "
                    "wants memory of its own for each element"
                )
            extent += stride * (size - 1)
    if arrays.is_cuda(array):
        pointer = array.data.ptr
        if pointer % arrays.ALIGNMENT or any(stride % arrays.ALIGNMENT for stride in used):
            raise ArgumentError(
                f"{name}: got an address that is {pointer % arrays.ALIGNMENT} past a multiple of 16 bytes and strides "
                f"{tuple(stride // item for stride in array.strides)}; wants a 16-byte aligned address and strides "
                "that are multiples of 8 elements"
            )


def check_view(name: str, x: Any, device: int | None, layout: str = "bshd") -> Any:
    """One tensor as a bshd view, its axes, dtype, place, address and strides checked; its sizes are the caller's."""
    if not isinstance(layout, str) or layout not in arrays.LAYOUTS:
        raise ArgumentError(f"layout: got {layout!r}; wants one of {', '.join(map(repr, arrays.LAYOUTS))}")
    view = _check_tensor(name, x, device, layout)
    _check_strides(name, view)
    return view


def as_arrays(q: Any, k: Any, v: Any, layout: str = "bshd") -> tuple[Any, Any, Any]:
    """Checked bshd views of q, k and v, all NumPy's or all CuPy's on one device.

    q: [batch, seqlen_q, num_heads, head_dim]; k, v: [batch, seqlen_k, num_kv_heads, head_dim] (in "bhsd" with the
    middle axes swapped), float16 or bfloat16. Raises ArgumentError or DtypeError.
    """
    if not isinstance(layout, str) or layout not in arrays.LAYOUTS:
        raise ArgumentError(f"layout: got {layout!r}; wants one of {', '.join(map(repr, arrays.LAYOUTS))}")
    device = arrays.place_of("q", q)
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
        cupy, num_bytes = arrays.import_cupy(), math.prod(shape) * dtype.itemsize
        memory = cupy.cuda.UnownedMemory(arrays.WORKSPACE_ALIGNMENT, num_bytes, None, device)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))
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
    by_name = {name: known for known, name in arrays.DTYPE_NAMES.items()}
    try:
        found = by_name.get(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    except TypeError:
        found = None
    if found not in arrays.DTYPE_NAMES:
        wanted = " or ".join(map(repr, by_name))
        raise DtypeError(f"dtype: got {dtype!r}; wants {wanted}, as q, k and v are shapes")
    return found


def _check_device(device: Any) -> int:
    if not isinstance(device, (int, np.integer)) or isinstance(device, bool):
        raise ArgumentError(f"device: got {device!r}; wants the number of a CUDA device, or None for host memory")
    runtime = arrays.import_cupy().cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise GpuError(f"device: got {device}, but no GPU can be used: {error}") from error
    if not 0 <= device < count:
        raise ArgumentError(f"device: got {device}; wants 0 to {count - 1}, the CUDA devices that there are, or None")
    return int(device)


# --- calls ---------------------------------------------------------------------------------------------------------
def make_plan(q: Any, k: Any, v: Any, *, layout: str = "bshd", **options: Any) -> Plan:
    """The Plan of a call, for the stages.

    q, k, v, layout and options (causal, softmax_scale, estimator, attend, block, query_stride, full_rows, sink, local,
    dense_below, skipped, softcap, window_size) are those of ``sparse_attention``, checked in the same way. Raises
    ArgumentError, DtypeError; GpuError for a GPU that no kernel supports.
    """
    check_names("make_plan", options)
    with arrays.on_stream(q, None):
        q, k, v = as_arrays(q, k, v, layout)
        return plan_of_views(q, k, **options)


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
    place = arrays.place_of("sink_logits", sink_logits, "one number a head in a list, a NumPy or CuPy array")
    want = q.device.id if arrays.is_cuda(q) else None
    if place not in (None, want):
        wants = "host memory" if want is None else f"{arrays.place_name(want)} or host memory"
        raise ArgumentError(f"sink_logits: is on {arrays.place_name(place)}; wants {wants}")
    values = arrays.as_array("sink_logits", sink_logits, place)
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


def check_out(out: Any, q: Any, layout: str) -> Any:
    """``out``, in ``layout``, as a bshd view like q, which is one."""
    view = _check_tensor("out", out, q.device.id if arrays.is_cuda(q) else None, layout)
    order = arrays.LAYOUTS[layout]
    if view.shape != q.shape:
        got, want = (tuple(x.shape[axis] for axis in order) for x in (view, q))
        raise ArgumentError(f"out: got shape {got}; wants {want}, as q has")
    if view.dtype != q.dtype:
        raise DtypeError(f"out: got dtype {view.dtype}; wants {q.dtype}, as q has")
    _check_strides("out", view, is_output=True)
    if not arrays.is_cuda(view) and not view.flags.writeable:
        raise ArgumentError("out: is read-only; wants memory that can be written")
    return view


def check_apart(out: Any, **others: Any) -> None:
    """ArgumentError when ``out`` shares memory with one of these arrays, by the names of their arguments.

    On a GPU its rows are written while other CTAs read. Views of one buffer without a common element are fine.
    """
    start, end = arrays.span(out)
    for name, x in others.items():
        first, last = arrays.span(x)
        if start < last and first < end and arrays.have_common_bytes(out, x):
            raise ArgumentError(f"out: shares memory with {name}; wants memory of its own")


def check_workspace(workspace: Any, device: int, num_bytes: int) -> Any:
    """``workspace`` as a CuPy array of at least ``num_bytes`` contiguous, aligned bytes."""
    array = arrays.import_array("workspace", workspace, device)
    if not array.flags.c_contiguous:
        raise ArgumentError("workspace: is not contiguous; wants contiguous memory")
    if array.nbytes < num_bytes:
        raise ArgumentError(f"workspace: got {array.nbytes} bytes; wants at least {num_bytes}")
    if array.nbytes and array.data.ptr % arrays.WORKSPACE_ALIGNMENT:
        past = array.data.ptr % arrays.WORKSPACE_ALIGNMENT
        raise ArgumentError(
            f"workspace: got an address {past} past a multiple of {arrays.WORKSPACE_ALIGNMENT}; wants an aligned one"
        )
    return array


def check_call(
    q: Any, k: Any, v: Any, *, layout: str, out: Any, thresholds: Any = 0.0, sink_logits: Any = None, **options: Any
) -> Call:
    """Check a whole call inside ``on_stream`` and allocate its output when none is given."""
    q, k, v = as_arrays(q, k, v, layout)
    plan = plan_of_views(q, k, **options)
    thresholds = as_thresholds(thresholds, plan.num_heads, q)
    sink_logits = check_sink_logits(sink_logits, plan, q)
    order = arrays.LAYOUTS[layout]
    if out is None:
        make = arrays.import_cupy().empty if arrays.is_cuda(q) else np.empty
        result = make(tuple(q.shape[axis] for axis in order), q.dtype)
        view = arrays.in_layout(result, layout)
    else:
        result, view = out, check_out(out, q, layout)
        check_apart(view, q=q, k=k, v=v)
    return Call(
        plan=plan, q=q, k=k, v=v, out=view, result=result, thresholds=thresholds, sink_logits=sink_logits
    )
