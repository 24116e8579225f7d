"""Anchors: exact statistics of every row over the keys that are always kept, and the limits that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit, programs, reference, tensor_map
from .codes import Quantized
from .plans import CODE_TILE_ROWS, KEY_BLOCK, TILE_ROWS, WGMMA_HEAD_DIMS, Plan, ceil_div

_NULL = np.uint64(0)  # a pointer that a kernel does not read
_THREADS = 128
_SM90_THREADS = 416  # ANCHOR_THREADS of anchor_statistics_sm90.cu
_SM90_SLOTS = range(3, 7)  # NUM_SLOTS, up to ANCHOR_SLOTS
_SM90_SLOT_KEYS = 64  # SLOT_KEYS


def anchor_statistics(q: Any, k: Any, k_mean: Any, plan: Plan, sink_logits: Any = None) -> tuple[Any, ...]:
    """m and l, float32 [batch, num_heads, seqlen_q]: maximum of s and sum of exp(s - m) over a row's anchor keys.

    q: [batch, seqlen_q, num_heads, head_dim]; k: [batch, seqlen_k, num_kv_heads, head_dim], bshd views; k_mean: float32
    [batch, num_kv_heads, head_dim]. s is the score of the smoothed key (docs/algorithm.md, step 2). sink_logits: None,
    or float32 [num_heads] where q is: one more s of each row. With ``plan.softcap`` s is the capped score of the raw
    key, and a third array like m has ``softmax_scale * q.mean(k)``, for ``row_limits``. A row without a visible key has
    m = -inf, l = 0. NumPy arrays run the twin. On GPUs, rows that the plan does not hold (``Plan.holds_tested_rows``)
    are undefined.
    """
    if not arrays.is_cuda(q):
        return reference.anchor_statistics(q, k, k_mean, plan, sink_logits)
    shape = (plan.batch, plan.num_heads, plan.seqlen_q)
    m, l, *shift = (arrays.empty(shape, np.float32) for _ in range(3 if plan.softcap else 2))
    features = plan.score_features(sink_logits is not None)
    if not features and _uses_wgmma(plan) and all(tensor_map.can_encode(x) for x in (q, k)):
        stride = int(plan.q_row_map["stride"][0])
        jobs = plan.batch * plan.num_heads * plan.num_q_tiles
        jit.get_kernel(_sm90_spec(plan))(
            (min(jit.multiprocessors(), jobs),),
            (_SM90_THREADS,),
            (
                tensor_map.tensor_map(q, TILE_ROWS),
                tensor_map.tensor_map(q, TILE_ROWS // stride, stride),
                tensor_map.tensor_map(k, _SM90_SLOT_KEYS),
                tensor_map.tensor_map(k, KEY_BLOCK),
                k_mean,
                m,
                l,
                plan.shape_record,
                plan.q_row_map,
                np.float32(plan.softmax_scale),
            ),
        )
        return m, l
    jit.get_kernel(_anchor_spec(plan, features))(
        (plan.num_q_tiles, plan.num_heads // _heads_each(plan), plan.batch),
        (_THREADS,),
        (
            arrays.tensor_view(q),
            arrays.tensor_view(k),
            k_mean,
            m,
            l,
            plan.shape_record,
            plan.q_row_map,
            np.int32(_heads_each(plan)),
            np.float32(plan.softmax_scale),
            np.float32(plan.softcap),
            np.float32(plan.cap_factor),
            _NULL if sink_logits is None else sink_logits,
            shift[0] if shift else _NULL,
        ),
    )
    return m, l, *shift


def row_limits(m: Any, l: Any, quantized: Quantized, thresholds: Any, plan: Plan, shift: Any = None) -> Any:
    """What a row's scores have to exceed (docs/algorithm.md, step 4), in the form that ``estimate`` takes.

    int8 and int8-sp24: int32 thresholds of the integer scores; int4: float32 y = m + ln(tau * l). NumPy: [batch,
    num_heads, seqlen_q]; CuPy: [batch, num_heads, plan.num_positions], padding never votes. thresholds: a float, or
    float32 [num_heads] where m is. shift: with ``plan.softcap``, the third of the anchor statistics.
    """
    is_int4 = plan.estimator == "int4"
    if not arrays.is_cuda(m):
        y = reference.row_limits(m, l, thresholds, plan, shift)
        if is_int4:
            return y
        k_scale = np.repeat(quantized.k_scale, plan.group_size, axis=1)[:, :, None]
        return reference.integer_thresholds(y, quantized.q_scale, k_scale, plan)
    return _launch_limits(m, l, (quantized.q_scale, quantized.k_scale), thresholds, plan, not is_int4, shift)


def row_bases(m: Any, l: Any, plan: Plan) -> Any:
    """m + ln(l), float32 [batch, num_heads, plan.num_positions] on the GPU: what scores are relative to.

    +inf: the row never votes; -inf: m or l is not finite, and the row selects every visible block.
    """
    return _launch_limits(m, l, (_NULL, _NULL), 1.0, plan, False)


def _launch_limits(
    m: Any, l: Any, scales: tuple, thresholds: Any, plan: Plan, as_integers: bool, shift: Any = None
) -> Any:
    shape = (plan.batch, plan.num_heads, plan.num_positions)
    limits = arrays.empty(shape, np.int32 if as_integers else np.float32)
    on_device = not isinstance(thresholds, float)
    jit.get_kernel(_limits_spec(as_integers, plan))(
        (plan.num_positions // CODE_TILE_ROWS, plan.num_heads, plan.batch),
        (_THREADS,),
        (
            m,
            l,
            *scales,
            thresholds if on_device else _NULL,
            programs.float32(0.0 if on_device else thresholds),
            limits,
            plan.shape_record,
            plan.q_row_map,
            np.int32(plan.block_q),
            np.float32(plan.softmax_scale),
            np.float32(plan.softcap),
            _NULL if shift is None else shift,
        ),
    )
    return limits


def kernel_specs(plan: Plan, has_sinks: bool = False) -> list[jit.KernelSpec]:
    """The kernels that this module launches for this plan."""
    features = plan.score_features(has_sinks)
    hopper = [_sm90_spec(plan)] if not features and _uses_wgmma(plan) else []
    limits = _limits_spec(plan.estimator != "int4", plan)
    return [*hopper, _anchor_spec(plan, features), limits]


def _local_slots(plan: Plan) -> int:
    """64-key slots that the local range of a tile takes in anchor_statistics_sm90."""

    def slots(offset: int) -> int:
        first = (offset - plan.local) // KEY_BLOCK * KEY_BLOCK
        end = offset + TILE_ROWS + (0 if plan.causal else plan.local)
        return max(_SM90_SLOTS.start, ceil_div(end - first, _SM90_SLOT_KEYS))

    # Sequences with lengths of their own have offsets of their own: as many as any of them takes.
    return max(map(slots, range(KEY_BLOCK))) if plan.has_lengths else slots(plan.offset)


def _uses_wgmma(plan: Plan) -> bool:
    """Whether anchor_statistics_sm90 runs: anchors as few as its shared memory is made for."""
    is_known = plan.arch == "sm_90a" and plan.head_dim in WGMMA_HEAD_DIMS
    return is_known and plan.sink_end <= KEY_BLOCK and _local_slots(plan) in _SM90_SLOTS


def _heads_each(plan: Plan) -> int:
    """Heads of one KV head that a CTA takes, at most four: more share the keys, fewer fill the GPU sooner."""
    return next(heads for heads in (4, 3, 2, 1) if plan.group_size % heads == 0)


def _anchor_spec(plan: Plan, features: int = 0) -> jit.KernelSpec:
    stride = plan.query_stride if plan.holds_tested_rows else 1
    is_narrow = plan.head_dim <= 128  # the rows of two wide heads do not fit shared memory
    at_once = str(2 if is_narrow and _heads_each(plan) % (2 * stride) == 0 else 1)
    template = (str(plan.head_dim), plan.element, at_once, *([str(features)] if features else []))
    storage = f"AnchorStorage<{plan.head_dim}, {at_once}>"
    return jit.KernelSpec("anchor_statistics", template, storage, plan.has_lengths, plan.has_window)


def _sm90_spec(plan: Plan) -> jit.KernelSpec:
    template = (str(plan.head_dim), plan.element, str(_local_slots(plan)))
    return jit.KernelSpec("anchor_statistics_sm90", template, f"AnchorSm90Storage<{plan.head_dim}>", plan.has_lengths)


def bases_spec() -> jit.KernelSpec:
    """The kernel of :func:`row_bases`."""
    return _limits_spec(False, None)


def _limits_spec(as_integers: bool, plan: Plan | None) -> jit.KernelSpec:
    template = ("true" if as_integers else "false",)
    if plan is None:
        return jit.KernelSpec("row_limits", template)
    template += ("true",) if plan.softcap else ()
    return jit.KernelSpec("row_limits", template, None, plan.has_lengths, plan.has_window)
