"""SALE's own masks, and what bounds them: exact scores, the best blocks by attention mass, and the anchors' window."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..anchors import anchor_statistics
from ..block_scores import block_scores, scores_plan
from ..plans import Plan, ceil_div
from ..quantize import quantize
from . import grid


def estimator_levels(q: Any, k: Any, plan: Plan, estimator: str, query_stride: int) -> Any:
    """SALE (Ji et al., arXiv 2505.24179) with one of salekit's estimators: minus ``salekit.block_scores``.

    Kept at tau: blocks whose level is below -ln(tau), and SALE's anchors.
    """
    plan = scores_plan(plan.replace(estimator=estimator, query_stride=query_stride))
    codes = quantize(q, k, plan)
    scores = block_scores(codes, *anchor_statistics(q, k, codes.k_mean, plan), plan)
    anchors = grid.anchor_blocks(plan)
    return _each(scores, lambda one: grid.finish(-one, plan, anchors))


def exact_levels(q: Any, k: Any, plan: Plan) -> Any:
    """SALE's rule on exact scores: minus the largest ``s - (m + ln l)`` of a block's visible pairs; anchors stay."""
    xp = grid.module_of(q)
    plan = plan.replace(estimator="int8", query_stride=1)
    no_shift = xp.zeros((plan.batch, plan.num_kv_heads, plan.head_dim), np.float32)
    m, l = anchor_statistics(q, k, no_shift, plan)
    anchors = grid.anchor_blocks(plan)
    levels = xp.full((plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_k_blocks), np.inf, np.float32)
    with np.errstate(all="ignore"):
        for b in range(plan.batch):
            for head in range(plan.num_heads):
                queries, keys = grid.head_rows(q, b, head), grid.head_rows(k, b, head // plan.group_size)
                base = m[b, head] + xp.log(l[b, head])
                for block, s in grid.score_tiles(queries, keys, plan):
                    rows = slice(block * plan.block_q, block * plan.block_q + len(s))
                    best = s.max(axis=2) - base[rows, None]
                    # A row without a visible key has s = base = -inf: it selects nothing.
                    best = xp.where(xp.isneginf(base[rows, None]), -np.inf, best)
                    levels[b, head, block, : s.shape[1]] = -best.max(axis=0)
    return _each(levels, lambda one: grid.finish(one, plan, anchors))


def mass_levels(q: Any, k: Any, plan: Plan) -> Any:
    """The best any selector can do for recall: minus the attention mass of a block, summed over its rows."""

    def of_head(q, k, plan):
        xp = grid.module_of(q)
        levels = xp.full((plan.num_q_blocks, plan.num_k_blocks), np.inf, np.float32)
        for block, s in grid.score_tiles(q, k, plan):
            p = grid.softmax(s.reshape(len(s), -1))
            levels[block, : s.shape[1]] = -p.reshape(s.shape).sum(axis=(0, 2))
        return grid.finish(levels, plan)

    return grid.each_head(q, k, plan, of_head)


def window_levels(q: Any, k: Any, plan: Plan) -> Any:
    """Sink and local window alone (StreamingLLM, Xiao et al., arXiv 2309.17453), whatever q and k hold.

    The first ``plan.sink`` keys are kept; a block's level is the distance from its last key to the query block's first
    row. At window w a block is kept whose level is below w.
    """
    xp = grid.module_of(q)
    first, _ = grid.positions(plan)
    ends = np.minimum((np.arange(plan.num_k_blocks) + 1) * plan.block_k, plan.seqlen_k) - 1
    distance = np.maximum(first[:, None] - ends[None], 0).astype(np.float32)
    sink = np.zeros(distance.shape, bool)
    sink[:, : ceil_div(plan.sink_end, plan.block_k)] = True
    levels = xp.asarray(grid.finish(distance, plan, sink))
    return xp.broadcast_to(levels, (plan.batch, plan.num_heads, *levels.shape))


def _each(levels: Any, function: Any) -> Any:
    """function of one head's [num_q_blocks, num_k_blocks] each, in place."""
    for index in np.ndindex(*levels.shape[:2]):
        levels[index] = function(levels[index])
    return levels
