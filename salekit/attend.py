"""Attend: softmax attention over the selected blocks (docs/algorithm.md, step 5), exact or low-bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit, low_bit, reference, skipped_mass, tensor_map
from .attend_grid import (
    DENSE_BLOCK_Q,
    NULL,
    SM90_THREADS,
    SM90_TILE_KEYS,
    carried_floats,
    expand_log2,
    persistent_grid,
    segment_starts,
    segments,
    whole_call,
)
from .block_mask import BlockMask
from .plans import KEY_BLOCK, Plan, ceil_div
from .programs import stage

# Stages of K and V in attend_sm80. On an H100 two gain 1% on dense calls of 128 rows and lose 1% (128 rows) and 30% (64
# rows: fewer CTAs an SM) on real masks.
STAGES = 1


def attend(
    q: Any,
    k: Any,
    v: Any,
    mask: BlockMask | None,
    plan: Plan,
    out: Any = None,
    return_lse: bool = False,
    sink_logits: Any = None,
) -> tuple[Any, Any]:
    """Softmax attention over the selected blocks, float32 accumulation; by ``plan.attend`` from 8-bit products. With
    ``plan.skipped == "pool"`` over pools of the skipped blocks, too (``skipped_mass``).

    q: [batch, seqlen_q, num_heads, head_dim]; k, v: [batch, seqlen_k, num_kv_heads, head_dim]; bshd views, NumPy's (the
        twin runs) or CuPy's (16-byte aligned rows). mask: on the same backend; its own block counts, not the plan's.
        None: every visible key. out: where to write, like q; default a new array.
    sink_logits: None, or float32 [num_heads] where q is: one more logit of each row, without a value; lse includes it.
        Not for 8-bit products.

    Returns (out, lse): lse float32 [batch, num_heads, seqlen_q], natural log, over what was attended, or None without
    ``return_lse``. A row without a selected, visible key has out 0 and lse -inf, or the sink logit. Nothing is checked
    here.
    """
    pooled = mask is not None and plan.skipped == "pool"
    if not arrays.is_cuda(q):
        if pooled:
            each = skipped_mass.blocks_of_a_pool(mask)
            result, lse = skipped_mass.attend_with_pools(q, k, v, mask, plan, each)
        else:
            result, lse = reference.attend(q, k, v, mask, plan, sink_logits)
        if out is not None:
            out[...] = result
            result = out
        return result, lse if return_lse else None
    if out is None:
        out = arrays.empty(q.shape, q.dtype)
    with_lse = return_lse or pooled
    lse = arrays.empty((plan.batch, plan.num_heads, plan.seqlen_q), np.float32) if with_lse else None
    if out.size and plan.attend == "int8-fp8":
        low = low_bit.quantize_low_bit(q, k, v, plan, with_shift=with_lse)
        low_bit.attend_low_bit(low, mask, plan, out, lse)
    elif out.size:
        if _uses_wgmma(plan) and k.size and all(tensor_map.can_encode(x) for x in (q, k, v)):
            _launch_sm90(q, k, v, mask, plan, out, lse, sink_logits)
        else:
            _launch_sm80(q, k, v, mask, plan, out, lse, sink_logits=sink_logits)
    if out.size and pooled:
        with stage("pool"):
            skipped_mass.add_pools(q, k, v, mask, plan, out, lse)
    return out, lse if return_lse else None


def kernel_specs(plan: Plan, has_sinks: bool = False) -> list[jit.KernelSpec]:
    """The kernels that :func:`attend` launches for this plan: masked, and dense when that is another one."""
    block_rows = dict.fromkeys((plan.block_q, DENSE_BLOCK_Q))
    if plan.attend == "int8-fp8":
        return low_bit.kernel_specs(plan, list(block_rows))
    features = plan.score_features(has_sinks)
    hopper = [_sm90_spec(plan, block_q, features=features) for block_q in block_rows] if _uses_wgmma(plan) else []
    if hopper and len(segment_starts(plan)) > 1:
        hopper.append(_sm90_spec(plan, plan.block_q, in_segments=True, features=features))
    return hopper + [_sm80_spec(plan, block_q, STAGES, features) for block_q in block_rows]


def _uses_wgmma(plan: Plan) -> bool:
    return (plan.arch or jit.device_arch()) == "sm_90a"


def _launch_sm90(
    q: Any, k: Any, v: Any, mask: BlockMask | None, plan: Plan, out: Any, lse: Any, sink_logits: Any = None
) -> None:
    args = (
        tensor_map.tensor_map(q, DENSE_BLOCK_Q),
        *(tensor_map.tensor_map(x, rows) for rows in (KEY_BLOCK, SM90_TILE_KEYS[plan.head_dim]) for x in (k, v)),
        arrays.tensor_view(out),
        NULL if lse is None else lse,
        NULL if mask is None else mask.words,
        np.int32(expand_log2(mask)),
    )
    shape = (plan.shape_record, np.float32(plan.softmax_scale))
    scores = (np.float32(plan.softcap), np.float32(plan.cap_factor), NULL if sink_logits is None else sink_logits)
    features = plan.score_features(sink_logits is not None)
    block_q = DENSE_BLOCK_Q if mask is None else mask.block_q
    if mask is None or len(segment_starts(plan)) == 1:
        num_ctas, next_item = persistent_grid(plan)
        kernel = jit.get_kernel(_sm90_spec(plan, block_q, features=features))
        kernel((num_ctas,), (SM90_THREADS,), (*args, next_item, *shape, whole_call(plan), NULL, *scores))
        return
    kernel = jit.get_kernel(_sm90_spec(plan, block_q, in_segments=True, features=features))
    records = segments(plan)
    carried = arrays.empty((carried_floats(plan, records),), np.float32)
    next_items = arrays.zeros((len(records),), np.uint32)
    for i, record in enumerate(records):
        num_ctas = min(int(record["num_items"][0]), jit.multiprocessors())
        kernel((num_ctas,), (SM90_THREADS,), (*args, next_items[i : i + 1], *shape, record, carried, *scores))


def _launch_sm80(
    q: Any,
    k: Any,
    v: Any,
    mask: BlockMask | None,
    plan: Plan,
    out: Any,
    lse: Any,
    stages: int | None = None,
    sink_logits: Any = None,
) -> None:
    block_q = DENSE_BLOCK_Q if mask is None else mask.block_q
    stages = stages or STAGES
    cta_rows, threads = sm80_grid(plan, block_q)
    jit.get_kernel(_sm80_spec(plan, block_q, stages, plan.score_features(sink_logits is not None)))(
        (plan.batch * plan.num_heads * ceil_div(plan.seqlen_q, cta_rows),),
        (threads,),
        (
            *(arrays.row_view(x) for x in (q, k, v, out)),
            NULL if lse is None else lse,
            NULL if mask is None else mask.words,
            np.int32(expand_log2(mask)),
            plan.shape_record,
            np.float32(plan.softmax_scale),
            np.float32(plan.softcap),
            np.float32(plan.cap_factor),
            NULL if sink_logits is None else sink_logits,
        ),
    )


def sm80_grid(plan: Plan, block_q: int) -> tuple[int, int]:
    """Query rows and threads of a CTA of attend_sm80: AttendRows of attend_sm80.cu."""
    has_fewer = plan.head_dim > 128 or (plan.head_dim > 64 and (plan.softcap != 0 or plan.has_window))
    return (64, 128) if has_fewer else (block_q, block_q)


def _optional(features: int) -> tuple[str, ...]:
    return (str(features),) if features else ()


def _sm80_spec(plan: Plan, block_q: int, stages: int, features: int = 0) -> jit.KernelSpec:
    return jit.KernelSpec(
        "attend_sm80",
        (str(plan.head_dim), str(block_q), plan.element, str(stages), *_optional(features)),
        f"AttendSm80Storage<{plan.head_dim}, {sm80_grid(plan, block_q)[0]}, {stages}>",
        plan.has_lengths,
        plan.has_window,
    )


def is_segment(spec: jit.KernelSpec) -> bool:
    """Whether the kernel attends a segment of the keys: a call launches it once for each, one after another."""
    return spec.source == "attend_sm90" and spec.template[3] == "true"


def _sm90_spec(plan: Plan, mask_rows: int, in_segments: bool = False, features: int = 0) -> jit.KernelSpec:
    segmented = "true" if in_segments else "false"
    template = (str(plan.head_dim), plan.element, str(mask_rows), segmented, *_optional(features))
    storage = f"AttendSm90Storage<{plan.head_dim}>"
    return jit.KernelSpec("attend_sm90", template, storage, plan.has_lengths, plan.has_window)
