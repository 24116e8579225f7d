"""Low-bit attention on Hopper: q, k and v in 8 bits, and the kernel that multiplies them (docs/algorithm.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arrays, jit
from .attend_grid import DENSE_BLOCK_Q, NULL, SM90_THREADS, expand_log2, persistent_grid
from .block_mask import BlockMask
from .plans import CODE_TILE_ROWS, KEY_BLOCK, Plan
from .quantize import REDUCE_ROWS, channel_partials, reduce_spec
from .reference import LOW_BIT_Q_SAMPLE

_QUANTIZE_THREADS = 128
_BALANCE_PARTS = 8  # of finish_balance.cu


@dataclass(frozen=True)
class LowBit:
    """q, k and v of one call in 8 bits; CuPy arrays.

    q_codes, k_codes: int8 as tiles (see ``codes``), uint8 [batch, heads, padded, head_dim] in all. v_codes: e4m3, uint8
        [batch, num_kv_heads, padded_k / 32, head_dim / 8 + 1, 2, 8, 16], the last channels ones (quantize_e4m3.cu).
    q_scale: float32 [batch, num_heads, padded_q]; k_scale: [batch, num_kv_heads, padded_k / 32, 4], each four times
        over; v_scale: [batch, num_kv_heads, head_dim]. row_shift: like q_scale, q . mean(k), or None.
    """

    q_codes: Any
    k_codes: Any
    v_codes: Any
    q_scale: Any
    k_scale: Any
    v_scale: Any
    row_shift: Any = None


def quantize_low_bit(q: Any, k: Any, v: Any, plan: Plan, with_shift: bool) -> LowBit:
    """q, k and v (bshd views, CuPy's) as ``attend="int8-fp8"`` multiplies them. with_shift: for lse."""
    kv_shape = (plan.batch, plan.num_kv_heads)
    channels = (*kv_shape, plan.head_dim)
    k_mean, v_factor, v_scale = (arrays.empty(channels) for _ in range(3))
    balance = arrays.empty((*kv_shape, 2, plan.head_dim))
    sampled, of_keys = plan.lengths_of("sampled"), plan.lengths_of("k")
    (q_partials, q_chunks), (k_partials, k_chunks), (v_partials, _) = (
        channel_partials(x, plan, lengths)
        for x, lengths in ((q[:, ::LOW_BIT_Q_SAMPLE], sampled), (k, of_keys), (v, of_keys))
    )
    jit.get_kernel(_balance_spec(plan))(
        (plan.num_kv_heads, plan.batch),
        (_BALANCE_PARTS * plan.head_dim,),
        (
            q_partials,
            k_partials,
            v_partials,
            k_mean,
            balance,
            v_factor,
            v_scale,
            np.int32(plan.group_size),
            np.int32(q_chunks),
            np.int32(k_chunks),
            np.float64(1 / plan.seqlen_k),
            sampled,
            of_keys,
            np.int32(REDUCE_ROWS),
        ),
    )
    q_scale = arrays.empty((plan.batch, plan.num_heads, plan.padded_q))
    row_shift = arrays.empty(q_scale.shape) if with_shift else None
    k_scale = arrays.empty((*kv_shape, plan.padded_k // KEY_BLOCK, 4))
    q_codes = _quantize_balanced(q, "q", q_scale, row_shift, k_mean, balance, plan)
    k_codes = _quantize_balanced(k, "k", k_scale, None, k_mean, balance, plan)
    v_codes = arrays.empty((*kv_shape, plan.padded_k // KEY_BLOCK, plan.head_dim // 8 + 1, 2, 8, 16), np.uint8)
    jit.get_kernel(_e4m3_spec(plan))(
        (plan.padded_k // CODE_TILE_ROWS, plan.num_kv_heads, plan.batch),
        (_QUANTIZE_THREADS,),
        (arrays.tensor_view(v), v_codes, v_factor, np.int32(plan.seqlen_k), np.int32(plan.padded_k)),
    )
    return LowBit(q_codes, k_codes, v_codes, q_scale, k_scale, v_scale, row_shift)


def _quantize_balanced(x: Any, side: str, scale: Any, shift: Any, mean: Any, balance: Any, plan: Plan) -> Any:
    heads = x.shape[2]
    padded = plan.padded_k if side == "k" else plan.padded_q
    codes = arrays.empty((plan.batch, heads, padded, plan.head_dim), np.uint8)
    jit.get_kernel(_balanced_spec(plan, side))(
        (padded // CODE_TILE_ROWS, heads, plan.batch),
        (_QUANTIZE_THREADS,),
        (
            arrays.tensor_view(x),
            codes,
            scale,
            NULL if shift is None else shift,
            mean,
            balance,
            np.int32(x.shape[1]),
            np.int32(padded),
            np.int32(heads // plan.num_kv_heads),
            plan.lengths_of(side),
        ),
    )
    return codes


def attend_low_bit(low: LowBit, mask: BlockMask | None, plan: Plan, out: Any, lse: Any) -> None:
    """The 8-bit products over the selected blocks into out and lse (may be None), as :func:`salekit.attend` gives."""
    num_ctas, next_item = persistent_grid(plan)
    jit.get_kernel(_attend_spec(plan, DENSE_BLOCK_Q if mask is None else mask.block_q))(
        (num_ctas,),
        (SM90_THREADS,),
        (
            low.q_codes,
            low.k_codes,
            low.v_codes,
            low.q_scale,
            low.k_scale,
            low.v_scale,
            NULL if low.row_shift is None else low.row_shift,
            arrays.tensor_view(out),
            NULL if lse is None else lse,
            NULL if mask is None else mask.words,
            np.int32(expand_log2(mask)),
            next_item,
            plan.shape_record,
            np.float32(plan.softmax_scale),
        ),
    )


def kernel_specs(plan: Plan, mask_rows: list[int]) -> list[jit.KernelSpec]:
    """The kernels of this module for this plan and masks of that many query rows a block."""
    return [
        reduce_spec(plan),
        _balance_spec(plan),
        *(_balanced_spec(plan, side) for side in "qk"),
        _e4m3_spec(plan),
        *(_attend_spec(plan, rows) for rows in mask_rows),
    ]


def _balance_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("finish_balance", (str(plan.head_dim),), lengths=plan.has_lengths)


def _balanced_spec(plan: Plan, side: str) -> jit.KernelSpec:
    template = (str(plan.head_dim), plan.element, "true" if side == "k" else "false")
    return jit.KernelSpec("quantize_balanced", template, lengths=plan.has_lengths)


def _e4m3_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("quantize_e4m3", (str(plan.head_dim), plan.element))


def _attend_spec(plan: Plan, mask_rows: int) -> jit.KernelSpec:
    template = (str(plan.head_dim), plan.element, str(mask_rows))
    storage = f"AttendInt8Fp8Sm90Storage<{plan.head_dim}>"
    return jit.KernelSpec("attend_int8_fp8_sm90", template, storage, plan.has_lengths)
