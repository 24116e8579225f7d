"""Estimate: which key blocks matter, from low-bit products of the codes of q and k (docs/algorithm.md)."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit, reference
from .block_mask import BlockMask
from .codes import Quantized
from .errors import ArgumentError
from .plans import CODE_TILE_ROWS, KEY_BLOCK, Plan, ceil_div

KERNELS = ("auto", "mma", "wgmma")
_WGMMA_ROWS = 256  # tested query rows of a CTA of estimate_int8_sm90 and estimate_int4_sm90
_KEY_BOUNDS_FLOATS = 148  # sizeof(KeyBounds) of tile/group_bounds.cuh, in floats
_NULL = np.uint64(0)  # a pointer that a kernel does not read


def estimate(quantized: Quantized, limits: Any, plan: Plan, *, kernel: str = "auto") -> BlockMask:
    """The block mask: a block is set when a score in it exceeds its row's limit, or when it is an anchor.

    quantized: what ``quantize`` returned for this plan. limits: what ``row_limits`` returned: int8 and int8-sp24, int32
        thresholds of the integer scores; int4, float32 thresholds of the scores. NumPy, [batch, num_heads, seqlen_q],
        runs the twin; CuPy, [batch, num_heads, plan.num_positions], the GPU.
    kernel: "mma" (every architecture; codes of all rows in tiles) or "wgmma" (sm_90a, codes held in bytes) instead of
        the plan's choice. Their bits are equal.

    Returns a BlockMask of ``plan.block_q`` x ``plan.block_k`` blocks on the same backend. Nothing is checked here.
    """
    if not arrays.is_cuda(limits):
        return reference.estimate(quantized, limits, plan)
    words = arrays.empty((plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_words), np.uint32)
    if words.size:
        fine_words = ceil_div(plan.seqlen_k, 32 * KEY_BLOCK)
        fine = words if plan.block_k == KEY_BLOCK else arrays.empty((*words.shape[:3], fine_words), np.uint32)
        _launch_estimate(quantized, limits, fine, plan, kernel)
        if fine is not words:
            num_rows = words.size // plan.num_words
            jit.get_kernel(_coarsen_spec(plan))(
                (ceil_div(words.size, 256),), (256,),
                (fine, words, np.int64(num_rows), np.int32(fine_words), np.int32(plan.num_words)),
            )
    sizes = (plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k)
    return BlockMask(words, *sizes, plan.causal, plan.window_left, plan.window_right)


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels that :func:`estimate` launches for this plan."""
    main = [_mma_spec(plan, plan.code_bits)]
    if _uses_wgmma(plan, "auto"):
        main = [_bounds_spec(plan), _int4_wgmma_spec(plan)] if plan.estimator == "int4" else [_wgmma_spec(plan)]
    return main if plan.block_k == KEY_BLOCK else [*main, _coarsen_spec(plan)]


def _launch_estimate(quantized: Quantized, limits: Any, words: Any, plan: Plan, kernel: str) -> None:
    heads = plan.batch * plan.num_heads
    if kernel == "wgmma" and not plan.replace(arch="sm_90a").uses_wgmma_estimate:
        raise ArgumentError(
            "kernel: 'wgmma' has no windows, and int4 with head_dim 64 and 128; wants 'auto' or 'mma' for this plan"
        )
    if _uses_wgmma(plan, kernel) and plan.estimator == "int4":
        _launch_int4_wgmma(quantized, limits, words, plan)
        return
    if _uses_wgmma(plan, kernel):
        jit.get_kernel(_wgmma_spec(plan))(
            (ceil_div(plan.num_positions, _WGMMA_ROWS) * heads,), (384,),
            (quantized.q_codes, quantized.k_codes, limits, words, plan.shape_record, plan.q_row_map),
        )
        return
    if plan.q_is_sparse or plan.holds_tested_rows:
        raise ArgumentError("kernel: 'mma' reads codes of all rows in tiles; wants 'auto' or 'wgmma' for this plan")
    groups = (_NULL, _NULL, _NULL)
    if plan.estimator == "int4":
        groups = (quantized.q_scale, quantized.k_scale, quantized.correction)
    jit.get_kernel(_mma_spec(plan, quantized.code_bits))(
        (ceil_div(plan.seqlen_q, CODE_TILE_ROWS) * heads,), (128,),
        (
            quantized.q_codes, quantized.k_codes, limits, *groups, words, plan.shape_record,
            np.float32(plan.softmax_scale),
        ),
    )


def _launch_int4_wgmma(quantized: Quantized, limits: Any, words: Any, plan: Plan) -> None:
    key_tiles = plan.padded_k // CODE_TILE_ROWS
    scales = (quantized.k_scale, quantized.correction)
    bounds = arrays.empty((plan.batch, plan.num_heads, key_tiles, _KEY_BOUNDS_FLOATS), np.float32)
    jit.get_kernel(_bounds_spec(plan))(
        (key_tiles, plan.num_heads, plan.batch), (CODE_TILE_ROWS,), (*scales, bounds, plan.shape_record)
    )
    jit.get_kernel(_int4_wgmma_spec(plan))(
        (ceil_div(plan.seqlen_q, _WGMMA_ROWS) * plan.batch * plan.num_heads,), (384,),
        (
            quantized.q_codes, quantized.k_codes, limits, quantized.q_scale, *scales, bounds, words,
            plan.shape_record, np.float32(plan.softmax_scale),
        ),
    )


def _uses_wgmma(plan: Plan, kernel: str) -> bool:
    if kernel == "auto":
        return plan.uses_wgmma_estimate
    return kernel == "wgmma"


def _wgmma_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec(
        "estimate_int8_sm90",
        (str(plan.head_dim), str(plan.block_q), "true" if plan.q_is_sparse else "false"),
        f"EstimateInt8Storage<{plan.head_dim}>",
        plan.has_lengths,
    )


def _int4_wgmma_spec(plan: Plan) -> jit.KernelSpec:
    template, storage = (str(plan.head_dim), str(plan.block_q)), f"EstimateInt4Storage<{plan.head_dim}>"
    return jit.KernelSpec("estimate_int4_sm90", template, storage, plan.has_lengths)


def _bounds_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("prepare_int4_bounds", lengths=plan.has_lengths)


def _mma_spec(plan: Plan, code_bits: int) -> jit.KernelSpec:
    codes = "Int8" if plan.estimator != "int4" else {4: "Int4", 8: "Int4InBytes"}[code_bits]
    windowed = ("true",) if plan.has_window else ()
    template = (str(plan.head_dim), codes, str(plan.block_q), *windowed)
    return jit.KernelSpec("estimate_sm80", template, lengths=plan.has_lengths, window=plan.has_window)


def _coarsen_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("coarsen_mask", (str(plan.block_k // KEY_BLOCK),))
