"""Quantise: low-bit codes and scales of q and of the smoothed k (DESIGN section 3, step 1, and section 4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit, reference
from .codes import Quantized
from .plans import CODE_TILE_ROWS, Plan, ceil_div

_NULL = np.uint64(0)  # a pointer that a kernel does not read, or a result that is not wanted
_CHUNK_ROWS = 512  # rows of a CTA of reduce_channels: many CTAs from 16K rows on, few partials


def quantize(q: Any, k: Any, plan: Plan) -> Quantized:
    """Codes, scales, means and, for int4, corrections by the plan's estimator (SALE, arXiv 2505.24179, section 3.2).

    q: [batch, seqlen_q, num_heads, head_dim]; k: [batch, seqlen_k, num_kv_heads, head_dim]; bshd views, float16 or
        bfloat16, NumPy's (the twin runs, codes in rows) or CuPy's (16-byte aligned rows; codes in tiles).

    Returns a Quantized; see there for shapes. A group with a NaN or inf has codes 0 and scale NaN. Nothing is checked here.
    """
    if not arrays.is_cuda(q):
        return reference.quantize(q, k, plan)
    cupy = arrays.import_cupy()

    def empty(*shape: int, dtype: Any = np.float32) -> Any:
        return cupy.empty((plan.batch, *shape), dtype)

    heads, kv_heads, row_bytes = plan.num_heads, plan.num_kv_heads, plan.code_row_bytes
    q_tiles, k_tiles = plan.padded_q // CODE_TILE_ROWS, plan.padded_k // CODE_TILE_ROWS
    q_codes = empty(heads, q_tiles, CODE_TILE_ROWS * row_bytes, dtype=np.uint8)
    k_codes = empty(kv_heads, k_tiles, CODE_TILE_ROWS * row_bytes, dtype=np.uint8)
    q_grid, k_grid = plan.batch * q_tiles * heads, plan.batch * k_tiles * kv_heads
    q_view, k_view = arrays.tensor_view(q), arrays.tensor_view(k)
    queries_spec, keys_spec = _coding_specs(plan)

    k_mean = empty(kv_heads, plan.head_dim)
    if plan.estimator == "int4":
        q_mean = empty(heads, plan.head_dim)
        q_scale, k_scale = empty(heads, plan.padded_q // 2), empty(kv_heads, plan.padded_k // 8)
        correction = empty(heads, plan.padded_k)
        _channel_statistics(k, plan, k_mean)
        _channel_statistics(q, plan, q_mean)
        jit.get_kernel(queries_spec)(
            (q_grid,), (256,), (q_view, q_mean, q_codes, q_scale, plan.shape_record)
        )
        jit.get_kernel(keys_spec)(
            (k_grid,), (2 * plan.head_dim,),
            (k_view, k_mean, q_mean, k_codes, k_scale, correction, plan.shape_record),
        )
        return Quantized("int4", plan.code_bits, q_codes, k_codes, q_scale, k_scale, k_mean, q_mean, correction)

    q_scale, k_scale, factor = empty(heads, plan.padded_q), empty(kv_heads), empty(kv_heads)
    rms = empty(kv_heads, plan.head_dim) if plan.estimator == "int8-sp24" else _NULL
    _channel_statistics(k, plan, k_mean, rms, k_scale, factor)
    jit.get_kernel(queries_spec)((q_grid,), (256,), (q_view, rms, q_codes, q_scale, plan.shape_record))
    jit.get_kernel(keys_spec)((k_grid,), (256,), (k_view, k_mean, factor, k_codes, plan.shape_record))
    return Quantized(plan.estimator, 8, q_codes, k_codes, q_scale, k_scale, k_mean)


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels that :func:`quantize` launches for this plan."""
    return [*_channel_specs(plan), *_coding_specs(plan)]


def _channel_statistics(x: Any, plan: Plan, mean: Any, rms: Any = _NULL, scale: Any = _NULL, factor: Any = _NULL) -> None:
    """Fill float32 mean, and rms about it where wanted, [batch, heads, head_dim]; and int8's scale and factor [batch, heads]."""
    batch, seqlen, heads, head_dim = x.shape
    num_chunks = ceil_div(seqlen, _CHUNK_ROWS)
    partials = arrays.import_cupy().empty((batch, heads, num_chunks, 4, head_dim), np.float32)
    reduce_spec, finish_spec = _channel_specs(plan)
    sizes = np.int32(num_chunks), np.int32(_CHUNK_ROWS)
    jit.get_kernel(reduce_spec)(
        (batch * num_chunks * heads,), (256,), (arrays.tensor_view(x), partials, np.int32(seqlen), np.int32(heads), *sizes)
    )
    jit.get_kernel(finish_spec)(
        (heads, batch), (1024,), (partials, mean, rms, scale, factor, np.int32(seqlen), *sizes)
    )


def _channel_specs(plan: Plan) -> tuple[jit.KernelSpec, jit.KernelSpec]:
    head_dim = str(plan.head_dim)
    return jit.KernelSpec("reduce_channels", (head_dim, plan.element)), jit.KernelSpec("finish_channels", (head_dim,))


def _coding_specs(plan: Plan) -> tuple[jit.KernelSpec, jit.KernelSpec]:
    """Of q and of k."""
    common = (str(plan.head_dim), plan.element)
    if plan.estimator == "int4":
        bits = str(plan.code_bits)
        return (
            jit.KernelSpec("quantize_queries_int4", (*common, bits)),
            jit.KernelSpec("quantize_keys_int4", (*common, bits)),
        )
    prune = "true" if plan.estimator == "int8-sp24" else "false"
    return jit.KernelSpec("quantize_queries_int8", (*common, prune)), jit.KernelSpec("quantize_keys_int8", common)
