"""Block scores: in one estimation pass, what decides each block's bit at any tau.

A block is selected when some pair in it has ``score > m + ln(tau * l)`` (docs/algorithm.md, step 4), so when the
largest ``score - (m + ln l)`` of its pairs exceeds ln(tau). That number is the block's score: the logarithm of the tau
up to which the block stays selected.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import anchors, arrays, jit, reference, reference_scores
from .block_mask import BlockMask
from .codes import Quantized
from .errors import ArgumentError
from .plans import CODE_TILE_ROWS, Plan, ceil_div
from .thresholds import host_thresholds

_THREADS = 128
_WORDS_EACH = 8  # words of a CTA of mask_from_scores
_NULL = np.uint64(0)  # a pointer that a kernel does not read


def scores_plan(plan: Plan) -> Plan:
    """The plan to quantise with for :func:`block_scores`: codes of all rows, in tiles.

    ArgumentError for a plan with softcap or a window, which have no block scores.
    """
    if plan.softcap or plan.has_window:
        raise ArgumentError("plan: has softcap or a window; wants one without, for block scores know neither")
    return plan.replace(arch="sm_80") if plan.holds_tested_rows or plan.q_is_sparse else plan


def block_scores(quantized: Quantized, m: Any, l: Any, plan: Plan) -> Any:
    """float32 [batch, num_heads, num_q_blocks, num_k_blocks], natural logarithms.

    quantized: what ``quantize`` returned for ``scores_plan(plan)``; m, l: what ``anchor_statistics`` returned, for
    either plan. A block's score is the largest estimated score less m + ln(l) over its pairs that are visible and
    whose row is tested (query_stride, full_rows). +inf: always selected, an anchor or a block of a row or KV head that
    is not finite; the largest float: selected at every finite tau, of an int4 group that is not finite; -inf: never
    selected, nothing in it is visible. NumPy arrays run the twin. ArgumentError for codes
    that ``scores_plan`` would not have asked for.
    """
    if scores_plan(plan) is not plan:
        raise ArgumentError("plan: holds codes of q in another form; wants scores_plan(plan)")
    if not arrays.is_cuda(m):
        return reference_scores.block_scores(quantized, reference.row_limits(m, l, 1.0, plan), plan)
    shape = (plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_k_blocks)
    scores = arrays.empty(shape, np.float32)
    if scores.size:
        bases = anchors.row_bases(m, l, plan)
        jit.get_kernel(_scores_spec(plan, quantized.code_bits))(
            (ceil_div(plan.seqlen_q, CODE_TILE_ROWS) * plan.batch * plan.num_heads,), (_THREADS,),
            (
                quantized.q_codes, quantized.k_codes, bases, quantized.q_scale, quantized.k_scale,
                _NULL if quantized.correction is None else quantized.correction, scores, plan.shape_record,
                np.float32(plan.softmax_scale), np.int32(plan.block_k),
            ),
        )
    return scores


def mask_from_scores(scores: Any, thresholds: Any, plan: Plan) -> BlockMask:
    """The mask at these thresholds, where the scores are: a bit is set when its score exceeds ln(tau), or is +inf.

    scores: what :func:`block_scores` returned, or such scores changed: those of blocks without a visible pair do not
    count. thresholds: tau, a float or [num_heads] on the host; 0, NaN and negative values select all of a head. The
    bits are those of ``estimate`` at this tau, save for blocks whose score is within :func:`rounding_bound` of ln(tau).
    Raises ArgumentError, DtypeError for thresholds of another shape or kind.
    """
    taus = host_thresholds(thresholds, plan.num_heads)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_taus = np.log(taus).astype(np.float32)
    log_taus = np.broadcast_to(np.where(np.isnan(log_taus), np.float32(-np.inf), log_taus), (plan.num_heads,))
    if arrays.is_cuda(scores):
        words = arrays.empty(plan.words_shape, np.uint32)
        if words.size:
            jit.get_kernel(_mask_spec())(
                (ceil_div(words.size, _WORDS_EACH),), (32 * _WORDS_EACH,),
                (
                    scores, arrays.import_cupy().asarray(np.ascontiguousarray(log_taus)), words, plan.shape_record,
                    np.int32(plan.block_q), np.int32(plan.block_k),
                ),
            )
        return BlockMask(words, plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal)
    bits = (scores > log_taus[:, None, None]) | np.isposinf(scores)
    return BlockMask.from_dense(bits, plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal)


def rounding_bound(largest_base: Any, thresholds: Any, num_anchors: int) -> Any:
    """How near to ln(tau) a block's score may be for ``estimate`` and :func:`mask_from_scores` to differ.

    largest_base: the largest ``|m + ln l|`` of a tested row; num_anchors: the most anchor keys a row has (l is at most
    that). With e = 2^-24, an integer score x worth u and a = m + ln(l), the estimate tests x > floor(y / u), which is
    x > y / u, with y = m + ln(tau * l); the mask tests x * u - a > ln(tau). Where the two differ, x * u is near y, of
    size |a| + |ln tau|. Rounded are: y, y / u, x and x * u (e of that size each); a (e |a|); the difference and ln(tau)
    (e |ln tau| each); tau and tau * l (e each); and both logarithms of l, to a unit in the last place (2e of ln l and
    2e of |ln tau| + ln l). Not covered: scales whose product is not a normal float32, integer scores beyond 2^30.
    """
    with np.errstate(divide="ignore"):
        log_tau = np.abs(np.log(np.asarray(thresholds, np.float64)))
    return 2.0**-24 * (5 * largest_base + 8 * log_tau + 4 * np.log(num_anchors) + 2)


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels that this module launches for this plan."""
    plan = scores_plan(plan)
    return [anchors.bases_spec(), _scores_spec(plan, plan.code_bits), _mask_spec()]


def _scores_spec(plan: Plan, code_bits: int) -> jit.KernelSpec:
    codes = "Int8" if plan.estimator != "int4" else {4: "Int4", 8: "Int4InBytes"}[code_bits]
    return jit.KernelSpec("block_scores", (str(plan.head_dim), codes, str(plan.block_q)))


def _mask_spec() -> jit.KernelSpec:
    return jit.KernelSpec("mask_from_scores")
