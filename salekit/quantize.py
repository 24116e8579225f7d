"""Quantise: smoothed low-bit codes of q and k, with their scales (docs/algorithm.md)."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit, reference
from .codes import Quantized, sparse_steps
from .plans import CODE_TILE_ROWS, Plan, ceil_div, padded_dim, row_map_record

_NULL = np.uint64(0)  # a pointer that a kernel does not read or write
REDUCE_ROWS = 512  # REDUCE_ROWS of reduce_channels.cu
_THREADS = 256
_STEPS = 4  # QUANTIZE_STEPS of quantize_int8.cu and quantize_int8_sparse.cu
_SIDES = {"k": 0, "q": 1, "q pruned": 2, "k given": 3}


def quantize(q: Any, k: Any, plan: Plan, k_statistics: Any = None) -> Quantized:
    """Codes and scales of q and of the smoothed k, by the plan's estimator.

    q: [batch, seqlen_q, num_heads, head_dim]; k: [batch, seqlen_k, num_kv_heads, head_dim], bshd views. NumPy
    arrays give codes in rows, CuPy arrays the codes of the tested rows in tiles, padded (see ``codes.Quantized``).
    k_statistics: a KeyStatistics to use instead of k's own.
    """
    if not arrays.is_cuda(q):
        return reference.quantize(q, k, plan, k_statistics)
    if plan.estimator == "int4":
        return _quantize_int4(q, k, plan, k_statistics)
    pruned = plan.estimator == "int8-sp24"
    if k_statistics is None:
        k_mean, rms, k_amax, k_scale = _channel_statistics(k, plan, plan.lengths_of("k"), pruned, with_amax=True)
    else:
        k_mean, rms, k_amax, k_scale = k_statistics.arrays
    q_scale = _empty((plan.batch, plan.num_heads, plan.num_positions))
    q_codes = _quantize_int8(q, _q_side(plan), q_scale, rms if pruned else None, plan)
    k_codes = _quantize_int8(k, "k" if k_statistics is None else "k given", k_amax, k_mean, plan)
    return Quantized(plan.estimator, 8, q_codes, k_codes, q_scale, k_scale, k_mean)


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels that :func:`quantize` launches for this plan."""
    common = [reduce_spec(plan), _finish_spec(plan)]
    if plan.estimator == "int4":
        return common + [_int4_spec("q", plan), _int4_spec("k", plan)]
    return common + [_int8_spec(side, plan) for side in (_q_side(plan), "k", "k given")]


def _q_side(plan: Plan) -> str:
    if plan.estimator == "int8":
        return "q"
    return "q sparse" if plan.q_is_sparse else "q pruned"


def _empty(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return arrays.empty(shape, dtype)


def _empty_codes(heads: int, padded: int, plan: Plan) -> Any:
    shape = (plan.batch, heads, padded // CODE_TILE_ROWS, CODE_TILE_ROWS * plan.code_row_bytes)
    return _empty(shape, np.uint8)


def channel_partials(x: Any, plan: Plan, lengths: Any = _NULL) -> tuple[Any, int]:
    """What reduce_channels knows of each channel: float32 [batch, heads, chunks, 4, head_dim], and chunks.

    lengths: rows of each batch, int32 [batch] on the GPU, where they are fewer than x's.
    """
    batch, seqlen, heads, head_dim = x.shape
    chunks = ceil_div(seqlen, REDUCE_ROWS)
    partials = _empty((batch, heads, chunks, 4, head_dim))
    jit.get_kernel(reduce_spec(plan))(
        (chunks, heads, batch), (_THREADS,), (arrays.tensor_view(x), partials, np.int32(seqlen), lengths)
    )
    return partials, chunks


def _channel_statistics(
    x: Any, plan: Plan, lengths: Any, with_rms: bool = False, with_amax: bool = False
) -> tuple[Any, Any, Any, Any]:
    """mean, rms about it ([batch, heads, head_dim]), largest deviation, int8 scale ([batch, heads]); None unasked."""
    batch, seqlen, heads, head_dim = x.shape
    partials, chunks = channel_partials(x, plan, lengths)
    mean = _empty((batch, heads, head_dim))
    rms = _empty((batch, heads, head_dim)) if with_rms else None
    amax, scale = (_empty((batch, heads)), _empty((batch, heads))) if with_amax else (None, None)
    jit.get_kernel(_finish_spec(plan))(
        (heads, batch),
        (4 * head_dim,),
        (
            partials,
            mean,
            *(_NULL if out is None else out for out in (rms, amax, scale)),
            np.int32(chunks),
            np.int32(REDUCE_ROWS),
            np.int32(seqlen),
            np.float64(1 / seqlen),
            np.float64(1 / REDUCE_ROWS),
            np.float64(1 / (seqlen - (chunks - 1) * REDUCE_ROWS)),
            lengths,
        ),
    )
    return mean, rms, amax, scale


def _quantize_int8(x: Any, side: str, scale: Any, statistics: Any, plan: Plan) -> Any:
    batch, seqlen, heads, head_dim = x.shape
    row_map = row_map_record(1, 0, 0, seqlen, plan.padded_k) if side.startswith("k") else plan.q_row_map
    positions = int(row_map["num_positions"][0])
    if side == "q sparse":
        codes = _empty((batch, heads, positions // 64, sparse_steps(head_dim), 5, 128), np.uint32)
    else:
        codes = _empty_codes(heads, positions, plan)
    rows = _THREADS // (padded_dim(head_dim) // 8) * _STEPS
    rows = max(rows, 64) if side == "q sparse" else rows
    group_size = plan.group_size if side in ("q pruned", "q sparse") else 1
    # Rows of q past a sequence's end are zeros, which have codes 0; zeros of k would not, after smoothing.
    lengths = () if side == "q sparse" else (plan.lengths_of("k") if side.startswith("k") else _NULL,)
    jit.get_kernel(_int8_spec(side, plan))(
        (positions // rows, heads, batch),
        (_THREADS,),
        (
            arrays.tensor_view(x), codes, scale, _NULL if statistics is None else statistics, row_map,
            np.int32(group_size), *lengths,
        ),
    )
    return codes


def _quantize_int4(q: Any, k: Any, plan: Plan, k_statistics: Any) -> Quantized:
    k_mean = _channel_statistics(k, plan, plan.lengths_of("k"))[0] if k_statistics is None else k_statistics.mean
    q_mean = _channel_statistics(q, plan, plan.lengths_of("q"))[0]
    q_codes = _empty_codes(plan.num_heads, plan.padded_q, plan)
    k_codes = _empty_codes(plan.num_kv_heads, plan.padded_k, plan)
    q_scale = _empty((plan.batch, plan.num_heads, plan.padded_q // 2))
    k_scale = _empty((plan.batch, plan.num_kv_heads, plan.padded_k // 8))
    correction = _empty((plan.batch, plan.num_heads, plan.padded_k))
    jit.get_kernel(_int4_spec("q", plan))(
        (plan.padded_q // CODE_TILE_ROWS, plan.num_heads, plan.batch),
        (_THREADS,),
        (
            arrays.tensor_view(q), q_codes, q_scale, q_mean, np.int32(plan.seqlen_q), np.int32(plan.padded_q),
            plan.lengths_of("q"),
        ),
    )
    jit.get_kernel(_int4_spec("k", plan))(
        (plan.padded_k // CODE_TILE_ROWS, plan.num_kv_heads, plan.batch),
        (2 * padded_dim(plan.head_dim),),
        (
            arrays.tensor_view(k),
            k_codes,
            k_scale,
            correction,
            k_mean,
            q_mean,
            np.int32(plan.seqlen_k),
            np.int32(plan.padded_k),
            np.int32(plan.group_size),
            plan.lengths_of("k"),
        ),
    )
    return Quantized("int4", plan.code_bits, q_codes, k_codes, q_scale, k_scale, k_mean, q_mean, correction)


def reduce_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("reduce_channels", (str(plan.head_dim), plan.element), lengths=plan.has_lengths)


def _finish_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("finish_channels", (str(plan.head_dim),), lengths=plan.has_lengths)


def _int8_spec(side: str, plan: Plan) -> jit.KernelSpec:
    if side == "q sparse":
        return jit.KernelSpec("quantize_int8_sparse", (str(plan.head_dim), plan.element))
    template = (str(plan.head_dim), plan.element, str(_SIDES[side]))
    return jit.KernelSpec("quantize_int8", template, lengths=plan.has_lengths and side.startswith("k"))


def _int4_spec(side: str, plan: Plan) -> jit.KernelSpec:
    template = (str(plan.head_dim), plan.element, str(plan.code_bits))
    return jit.KernelSpec(f"quantize_int4_{side}", template, lengths=plan.has_lengths)
