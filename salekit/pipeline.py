"""The whole of SALE on one screen: the same lines run NumPy arrays on the twin and CuPy arrays on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, call_checks, programs
from .anchors import anchor_statistics, row_limits
from .attend import attend as attend_stage
from .block_mask import BlockMask
from .estimate import estimate
from .jit import KernelSpec, get_kernel
from .plans import Plan, ceil_div
from .programs import stage
from .quantize import quantize

STORE_COUNT = 256  # values that one launch of store_floats writes
_VISIBLE_THREADS = 256


def run_stages(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    thresholds: Any,
    plan: Plan,
    return_lse: bool,
    return_mask: bool,
    sink_logits: Any = None,
    k_statistics: Any = None,
) -> tuple[Any, BlockMask | None]:
    """bshd views in, (lse, mask) out."""
    mask = None
    if not (plan.is_dense or is_zero(thresholds)):
        with stage("quantize"):
            quantized = quantize(q, k, plan, k_statistics)
        with stage("anchors"):
            m, l, *shift = anchor_statistics(q, k, quantized.k_mean, plan, sink_logits)
            limits = row_limits(m, l, quantized, thresholds, plan, *shift)
        with stage("estimate"):
            mask = estimate(quantized, limits, plan)
    with stage("attend"):
        lse = attend_stage(q, k, v, mask, plan, out=out, return_lse=return_lse, sink_logits=sink_logits)[1]
    if return_mask and mask is None:
        mask = all_visible(q, plan)
    return lse, mask


def is_zero(thresholds: Any) -> bool:
    return isinstance(thresholds, float) and thresholds == 0  # every block would be selected: nothing to estimate


def block_mask(words: Any, plan: Plan) -> BlockMask:
    sizes = (plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k)
    return BlockMask(words, *sizes, plan.causal, plan.window_left, plan.window_right)


def all_visible(q: Any, plan: Plan) -> BlockMask:
    """The mask of a dense call, where q is."""
    shape = plan.words_shape
    if arrays.is_cuda(q):
        words = arrays.empty(shape, np.uint32)
        if words.size:
            get_kernel(_visible_spec(plan))(
                (ceil_div(words.size, _VISIBLE_THREADS),),
                (_VISIBLE_THREADS,),
                (
                    words,
                    plan.shape_record,
                    np.int32(plan.block_q),
                    np.int32(plan.block_k),
                    np.int64(words.size // plan.num_words),
                    np.int32(plan.num_words),
                ),
            )
    else:
        ends = plan.first_visible_blocks + plan.visible_blocks
        below, hidden = (
            np.clip(blocks[:, None] - 32 * np.arange(plan.num_words), 0, 32).astype(np.uint64)
            for blocks in (ends, plan.first_visible_blocks)
        )
        row = ((np.uint64(1) << below) - (np.uint64(1) << hidden)).astype(np.uint32)
        words = np.ascontiguousarray(np.broadcast_to(row, shape))
    return block_mask(words, plan)


def recorded_thresholds(recorder: programs.Recorder, plan: Plan, kind: str) -> tuple[Any, list[Any]]:
    """(thresholds for the stages of a recorded call, the ports among them). kind: where each run has them, "device",
    "host" or "scalar", or "dense": 0."""
    if kind == "device":
        thresholds = recorder.array((plan.num_heads,), np.float32)
        return thresholds, [thresholds]
    if kind == "host":
        return store_numbers(plan), []
    return programs.ScalarParameter() if kind == "scalar" else 0.0, []


def recorded_sinks(recorder: programs.Recorder, plan: Plan, place: str | None) -> tuple[Any, list[Any]]:
    """(sink logits, the ports among them). place: where each run has them, "device" or "host"; None: nowhere."""
    if place == "device":
        sinks = recorder.array((plan.num_heads,), np.float32)
        return sinks, [sinks]
    return store_numbers(plan, 1) if place == "host" else None, []


def store_numbers(plan: Plan, group: int = 0) -> Any:
    """One number a head that each run of a recorded program gets from the host, in memory."""
    return store_values((plan.num_heads,), np.float32, group)


def store_values(shape: tuple[int, ...], dtype: Any, group: int = 0) -> Any:
    """Values of 4 bytes that each run of a recorded program gets from the host, in memory."""
    values = arrays.empty(shape, dtype)
    flat = values.reshape(-1)
    for start in range(0, flat.size, STORE_COUNT):
        target = flat[start : start + STORE_COUNT]
        get_kernel(_STORE_SPEC)(
            (1,), (STORE_COUNT,), (target, programs.Parameter(STORE_COUNT, group), np.int32(target.size))
        )
    return values


def kernel_specs(plan: Plan) -> list[KernelSpec]:
    """The kernels that this module launches itself."""
    return [_visible_spec(plan), _STORE_SPEC]


def _visible_spec(plan: Plan) -> KernelSpec:
    return KernelSpec("fill_visible", window=plan.has_window)


_STORE_SPEC = KernelSpec("store_floats", (str(STORE_COUNT),))


def run_twin(call: call_checks.Call, return_lse: bool, return_mask: bool, k_statistics: Any = None) -> Any:
    """A checked call with NumPy arrays."""
    plan = call.plan
    if plan.is_empty:
        lse = empty_attention(call.out, plan, call.sink_logits)
        mask = all_visible(call.q, plan)
    else:
        views = (call.q, call.k, call.v, call.out)
        more = dict(sink_logits=call.sink_logits, k_statistics=k_statistics)
        lse, mask = run_stages(*views, call.thresholds, plan, return_lse, return_mask, **more)
    return pack(call.result, lse, mask, return_lse, return_mask)


def pack(out: Any, lse: Any, mask: BlockMask | None, return_lse: bool, return_mask: bool) -> Any:
    """What the caller gets."""
    extras = (lse,) * bool(return_lse) + (mask,) * bool(return_mask)
    return (out, *extras) if extras else out


def empty_attention(out: Any, plan: Plan, sink_logits: Any = None) -> Any:
    """The lse of a call without a query row or without a key; ``out``, a bshd view, is zeroed.

    It is minus infinity, or the sink logits (of the host).
    """
    lse = np.full((plan.batch, plan.num_heads, plan.seqlen_q), -np.inf, np.float32)
    if sink_logits is not None:
        lse[...] = sink_logits[:, None]
    if not arrays.is_cuda(out):
        out[...] = 0
        return lse
    cupy = arrays.import_cupy()
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
