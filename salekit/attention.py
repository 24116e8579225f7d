"""The whole of SALE on one screen: the same lines run NumPy arrays on the twin and CuPy arrays on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .anchors import anchor_statistics, row_limits
from .attend import attend as attend_stage
from .block_mask import BlockMask
from .estimate import estimate
from .plans import Plan
from .quantize import quantize


def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    thresholds: Any = 0.008,
    causal: bool = True,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    estimator: str = "auto",
    attend: str = "exact",
    block: tuple[int, int] = (128, 32),
    query_stride: int = 1,
    full_rows: int = 1024,
    sink: int = 32,
    local: int = 128,
    dense_below: int = 1024,
    return_lse: bool = False,
    return_mask: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Sparse prefill attention by low-bit estimation (SALE, arXiv 2505.24179).

    q: [batch, seqlen_q, num_heads, head_dim], float16 or bfloat16; k, v: [batch, seqlen_k, num_kv_heads, head_dim];
        ``layout="bhsd"`` swaps the middle axes. Any strides with a contiguous last axis; on the GPU 16-byte aligned
        with strides that are multiples of 8 elements. NumPy arrays run on the twin; CuPy arrays, CUDA DLPack and
        ``__cuda_array_interface__`` objects on their GPU, without a host synchronisation.
    thresholds: tau, a scalar or float32 [num_heads]; 0 is a dense head, inf leaves the anchors. Values on the host are
        checked; in an array on the GPU NaN or a negative value means a dense head.
    causal: query i sees keys ``j <= i + seqlen_k - seqlen_q``. softmax_scale: default ``head_dim ** -0.5``.
    estimator: "int4" (the paper's), "int8", "int8-sp24" or "auto", which depends on the GPU alone.
    attend: "exact". block: (query rows, keys) of a mask block, 64 or 128 by 32, 64 or 128.
    query_stride: test every 1st, 2nd or 4th row of a block; the last ``full_rows`` rows are always tested.
    sink, local: keys at the start and before each query tile that are always kept.
    dense_below: up to this many keys the call is dense.
    out: where to write, like q and apart from q, k and v; it is returned.
    stream: a CuPy stream, a ``cudaStream_t`` as int, or None for CuPy's current one.

    Returns out (like q, in its layout), or a tuple (out[, lse][, mask]): lse float32 [batch, num_heads, seqlen_q],
    natural log, over what was computed; mask a BlockMask. A row without a visible key has out 0 and lse -inf. NaN and
    inf in q and k reach the output as in dense attention; those in v where their block is selected.
    Raises ArgumentError, DtypeError, GpuError, CompileError.
    """
    with arrays.on_stream(q, stream):
        call = arrays.check_call(
            q, k, v, layout=layout, out=out, thresholds=thresholds, causal=causal, softmax_scale=softmax_scale,
            estimator=estimator, attend=attend, block=block, query_stride=query_stride, full_rows=full_rows, sink=sink,
            local=local, dense_below=dense_below,
        )
        plan, mask = call.plan, None
        if not (plan.is_dense or _is_empty(plan) or _is_zero(call.thresholds)):
            quantized = quantize(call.q, call.k, plan)
            statistics = anchor_statistics(call.q, call.k, quantized.k_mean, plan)
            limits = row_limits(*statistics, quantized, call.thresholds, plan)
            mask = estimate(quantized, limits, plan)
        lse = _attend(call, mask, return_lse)
        if return_mask and mask is None:
            mask = _all_visible(call)
    return _pack(call.result, (lse, return_lse), (mask, return_mask))


def dense_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Exact attention over every visible key: ``sparse_attention`` with every block selected.

    Arguments, result (out, or (out, lse)) and errors are those of :func:`sparse_attention`.
    """
    with arrays.on_stream(q, stream):
        call = arrays.check_call(q, k, v, layout=layout, out=out, causal=causal, softmax_scale=softmax_scale)
        lse = _attend(call, None, return_lse)
    return _pack(call.result, (lse, return_lse))


def _attend(call: arrays.Call, mask: BlockMask | None, return_lse: bool) -> Any:
    if _is_empty(call.plan):
        return arrays.empty_attention(call)[1]
    return attend_stage(call.q, call.k, call.v, mask, call.plan, out=call.out, return_lse=return_lse)[1]


def _is_empty(plan: Plan) -> bool:
    return 0 in (plan.batch, plan.seqlen_q, plan.seqlen_k)


def _is_zero(thresholds: Any) -> bool:
    return isinstance(thresholds, float) and thresholds == 0  # every block would be selected: nothing to estimate


def _all_visible(call: arrays.Call) -> BlockMask:
    """The mask of a dense call, built on the host: it depends on the shapes alone."""
    plan = call.plan
    counts = np.clip(plan.visible_blocks[:, None] - 32 * np.arange(plan.num_words), 0, 32).astype(np.uint64)
    words = ((np.uint64(1) << counts) - np.uint64(1)).astype(np.uint32)
    words = np.ascontiguousarray(np.broadcast_to(words, (plan.batch, plan.num_heads, *words.shape)))
    if arrays.is_cuda(call.q):
        words = arrays.import_cupy().asarray(words)
    return BlockMask(words, plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal)


def _pack(out: Any, *wanted: tuple[Any, bool]) -> Any:
    extras = tuple(value for value, is_wanted in wanted if is_wanted)
    return (out, *extras) if extras else out
