"""Merge attention over two sets of keys: what context-parallel, cascade and split-key callers put together."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, call_checks, jit, reference
from .errors import ArgumentError, DtypeError
from .options import check_flag
from .plans import DTYPES, ceil_div

_THREADS = 256  # MERGE_THREADS of merge_states.cu
_CHUNK = 8  # channels of a thread
_NULL = np.uint64(0)
_ELEMENTS = {"float16": "Half", "bfloat16": "BFloat16"}


def merge_attention_states(
    out_a: Any,
    lse_a: Any,
    out_b: Any,
    lse_b: Any,
    *,
    layout: str = "bshd",
    out: Any = None,
    return_lse: bool = True,
    stream: Any = None,
) -> Any:
    """Attention over the keys of both of two calls with the same queries, from what the calls returned.

    out_a, out_b: [batch, seqlen_q, num_heads, head_dim], float16 or bfloat16 (``layout="bhsd"`` swaps the middle axes);
        any strides with a contiguous last axis, head_dim a multiple of 8; on the GPU 16-byte aligned rows.
    lse_a, lse_b: float32 [batch, num_heads, seqlen_q], natural log, contiguous last axis. Packed sequences as
        ``sparse_attention_varlen`` returns them merge, too: out [total_q, num_heads, head_dim], lse [num_heads,
        total_q].
    out: where to write, like out_a: out_a or out_b itself, or memory that it shares with no argument. stream: as in
        ``sparse_attention``.

    Returns (out, lse), or out alone without ``return_lse``: ``lse = ln(exp(lse_a) + exp(lse_b))`` and the mean of the
    outputs with weights ``exp(lse_a)`` and ``exp(lse_b)``, in float32. Where a lse is -inf that side has seen no key
    and its output is ignored; where both are, out is 0 and lse -inf. NaN in an output or a lse reaches the result; a
    lse of +inf gives NaN. Causal masks are the callers' affair: keys after all queries of a call have no part in it.
    On the GPU one launch, no synchronisation; it can be captured into a CUDA graph once it has run before. lse is
    allocated, out only when it is not given. Raises ArgumentError, DtypeError, GpuError, CompileError,
    OutOfMemoryError.
    """
    return_lse = check_flag("return_lse", return_lse)
    if not isinstance(layout, str) or layout not in arrays.LAYOUTS:  # of packed states, too, which have but one
        raise ArgumentError(f"layout: got {layout!r}; wants one of {', '.join(map(repr, arrays.LAYOUTS))}")
    with arrays.on_stream(out_a, stream, "out_a") as device:
        names = ("out_a", "out_b") if out is None else ("out_a", "out_b", "out")
        given = [arrays.import_array(name, x, device) for name, x in zip(names, (out_a, out_b, out))]
        lses = [arrays.import_array(name, x, device) for name, x in (("lse_a", lse_a), ("lse_b", lse_b))]
        is_packed = given[0].ndim == 3
        if is_packed:
            given, lses = ([_with_batch(name, x, ndim) for name, x in zip(named, group)]
                           for named, group, ndim in ((names, given, 3), (("lse_a", "lse_b"), lses, 2)))
            layout = "bshd"
        a, b = (call_checks.check_view(name, x, device, layout) for name, x in zip(names[:2], given))
        _check_alike(a, b, is_packed)
        shape = (a.shape[0], a.shape[2], a.shape[1])
        for name, lse in zip(("lse_a", "lse_b"), lses):
            _check_lse(name, lse, shape, is_packed)
        if out is not None and is_packed and given[2].shape != a.shape:
            raise ArgumentError(f"out: got shape {given[2].shape[1:]}; wants {a.shape[1:]}, as out_a has")
        if out is None:
            result = _empty(tuple(given[0].shape), a.dtype, device)
            target = arrays.in_layout(result, layout)
        else:
            result, target = given[2], call_checks.check_out(given[2], a, layout)
            # A thread reads of both sides what it writes, and the lse of the row: in place is fine, shifted is not.
            others = {name: x for name, x in zip(names, (a, b)) if not _is_same_view(x, target)}
            call_checks.check_apart(target, **others, lse_a=lses[0], lse_b=lses[1])
        if device is None:
            merged, lse = reference.merge_states(a, lses[0], b, lses[1])
            target[...] = merged
        else:
            lse = _empty(shape, np.float32, device) if return_lse else None
            _launch(a, lses[0], b, lses[1], target, lse)
        if is_packed:
            result, lse = result[0], None if lse is None else lse[0]
        result = result if out is None else out
        return (result, lse) if return_lse else result


def _with_batch(name: str, x: Any, ndim: int) -> Any:
    if x.ndim != ndim:
        raise ArgumentError(f"{name}: got {x.ndim} axes, shape {x.shape}; wants {ndim}, for out_a is packed")
    return x[None]


def _check_alike(a: Any, b: Any, is_packed: bool) -> None:
    if b.shape != a.shape:
        axes = "[total_q, num_heads, head_dim]" if is_packed else "[batch, seqlen, heads, head_dim]"
        got, want = (x.shape[1:] if is_packed else x.shape for x in (b, a))
        raise ArgumentError(f"out_b: got {axes} {got}; wants {want}, as out_a has")
    if b.dtype != a.dtype:
        raise DtypeError(f"out_b: got dtype {b.dtype}; wants {a.dtype}, as out_a has")
    if a.shape[3] == 0 or a.shape[3] % _CHUNK:
        raise ArgumentError(f"out_a: got head_dim {a.shape[3]}; wants a multiple of {_CHUNK}")


def _is_same_view(a: Any, b: Any) -> bool:
    """Of views of one shape: whether each element of one is at the same address in the other."""
    steps = zip(a.shape, a.strides, b.strides)
    return arrays.address_of(a) == arrays.address_of(b) and all(x == y for size, x, y in steps if size > 1)


def _check_lse(name: str, lse: Any, shape: tuple, is_packed: bool) -> None:
    if lse.dtype != np.float32:
        raise DtypeError(f"{name}: got dtype {lse.dtype}; wants float32")
    if lse.shape != shape:
        axes = "[num_heads, total_q]" if is_packed else "[batch, num_heads, seqlen_q]"
        got, want = (x[1:] if is_packed else x for x in (lse.shape, shape))
        raise ArgumentError(f"{name}: got shape {got}; wants {axes} = {want}")
    if shape[2] > 1 and lse.strides[2] != 4:
        raise ArgumentError(f"{name}: the last axis has a stride of {lse.strides[2]} bytes; wants 4 (contiguous)")
    if any(stride % 4 for stride in lse.strides):
        raise ArgumentError(f"{name}: got strides {lse.strides} bytes; wants multiples of 4")


def _empty(shape: tuple, dtype: Any, device: int | None) -> Any:
    return np.empty(shape, dtype) if device is None else arrays.allocate(arrays.import_cupy().ndarray, shape, dtype)


def _launch(a: Any, lse_a: Any, b: Any, lse_b: Any, out: Any, lse: Any) -> None:
    batch, seqlen, heads, head_dim = a.shape
    if out.size == 0:
        return
    chunks = head_dim // _CHUNK
    threads = batch * seqlen * heads * chunks
    jit.get_kernel(_spec(arrays.DTYPE_NAMES[a.dtype]))(
        (ceil_div(threads, _THREADS),),
        (_THREADS,),
        (
            arrays.tensor_view(a),
            _lse_view(lse_a),
            arrays.tensor_view(b),
            _lse_view(lse_b),
            arrays.tensor_view(out),
            _NULL if lse is None else lse,
            np.int64(threads),
            np.int32(seqlen),
            np.int32(heads),
            np.int32(chunks),
        ),
    )


def _lse_view(lse: Any) -> np.ndarray:
    """A ``TENSOR_VIEW`` whose row is the last axis."""
    batch, head = (stride // lse.itemsize for stride in lse.strides[:2])
    return np.array([(lse.data.ptr, batch, 1, head)], arrays.TENSOR_VIEW)


def _spec(dtype: str) -> jit.KernelSpec:
    return jit.KernelSpec("merge_states", (_ELEMENTS[dtype],))


def kernel_specs(plan: Any = None) -> list[jit.KernelSpec]:
    """The kernels of this module."""
    return [_spec(dtype) for dtype in DTYPES]
