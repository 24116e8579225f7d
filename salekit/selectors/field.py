"""The field's other ways to choose blocks, from their papers, over salekit's grid.

Each function gives levels, float32 [batch, num_heads, num_q_blocks, num_k_blocks]: a block is kept at a knob when its
level is small enough (``salekit.selectors``). All keep the blocks on the diagonal, so that a row always sees itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..plans import Plan
from . import grid

MINFERENCE_ROWS = 64  # last rows that stand for all
MINFERENCE_VERTICALS, MINFERENCE_SLASHES = 30, 100  # first keys and nearest diagonals that are always kept
FLEXPREFILL_ROWS = 128
FLEXPREFILL_TAU = 0.1  # a head whose pooled estimate is nearer than this to the truth is estimated block by block


def minference_levels(q: Any, k: Any, plan: Plan, verticals: int, slashes: int) -> Any:
    """MInference's vertical-slash pattern (Jiang et al., arXiv 2407.02490, section 3.2 and algorithm 1).

    The attention of the last 64 rows says which keys (verticals) and which distances (slashes) hold most. At knob r the
    best r * verticals keys and r * slashes distances are kept; the first 30 keys and the nearest 100 distances always.
    On the grid: a vertical takes the 32-key (block_k) blocks it lies in, where MInference gathers single keys, and a
    slash every block that one of its pairs lies in, where MInference takes 64 x 64 blocks.
    """

    def of_head(q, k, plan):
        xp = grid.module_of(q)
        p = grid.last_rows(q, k, plan, MINFERENCE_ROWS)
        vertical, slash = p.sum(axis=0), grid.diagonal_sums(p)
        vertical[:MINFERENCE_VERTICALS] = np.inf
        slash[:MINFERENCE_SLASHES] = np.inf
        of_key = ((grid.ranks(vertical) + 1) / verticals).astype(np.float32)
        of_distance = ((grid.ranks(slash) + 1) / slashes).astype(np.float32)
        of_key[:MINFERENCE_VERTICALS] = -np.inf
        of_distance[:MINFERENCE_SLASHES] = -np.inf
        padded = xp.full(plan.num_k_blocks * plan.block_k, np.inf, np.float32)
        padded[: plan.seqlen_k] = of_key
        of_column = padded.reshape(plan.num_k_blocks, plan.block_k).min(axis=1)
        first, last = grid.positions(plan)
        starts = np.arange(plan.num_k_blocks) * plan.block_k
        ends = np.minimum(starts + plan.block_k, plan.seqlen_k) - 1
        of_block = grid.range_minimum(of_distance, first[:, None] - ends[None], last[:, None] - starts[None])
        return grid.finish(xp.minimum(of_block, of_column[None]), plan)

    return grid.each_head(q, k, plan, of_head)


def flexprefill_levels(q: Any, k: Any, plan: Plan) -> Any:
    """FlexPrefill (Lai et al., arXiv 2502.20766, algorithms 1 to 3); the knob is gamma, tau .1, min_budget one block.

    A head whose block-pooled estimate of the last 128 rows' attention is near the truth (root of the Jensen-Shannon
    divergence below tau) is query-aware: its blocks are taken by pooled attention, largest share first over the whole
    head, until gamma is covered. Any other is vertical-slash: as many blocks of columns and of diagonals as keys and
    distances are needed to cover gamma of the last 128 rows. On the grid: columns and diagonals are pooled by block_k,
    diagonals run over block_k x block_k blocks, and a query block takes the OR of its rows; at 128x128 this is the
    authors' grid.
    """

    def of_head(q, k, plan):
        xp = grid.module_of(q)
        p = grid.last_rows(q, k, plan, FLEXPREFILL_ROWS)
        size, num_blocks = plan.block_k, plan.num_k_blocks
        vertical, slash = p.mean(axis=0), grid.diagonal_sums(p)[::-1] / len(p)  # slash from the farthest, as pooled
        of_column, of_diagonal = (
            _coverage_levels(grid.block_sums(x, size), x, size, forced) for x, forced in ((vertical, 0), (slash, -1))
        )
        of_diagonal = of_diagonal[::-1]  # by distance, in blocks
        first, last = (np.maximum(x, 0)[:, None] // size for x in grid.positions(plan))
        blocks = np.arange(num_blocks)[None]
        keys = grid.block_means(k, size)
        scale = np.float32(plan.softmax_scale)
        pooled = grid.softmax(scale * (q[-FLEXPREFILL_ROWS:].mean(axis=0) @ keys.T))
        if bool(_js_distance(pooled, grid.block_sums(vertical, size)) < FLEXPREFILL_TAU):
            s = scale * (grid.block_means(q, plan.block_q) @ keys.T)
            share = grid.softmax(xp.where(xp.asarray(grid.visible_blocks(plan)), s, -np.inf))
            # The sum over all rows, not scaled: rows without a visible key have no share of it.
            levels = grid.cumulative(share.reshape(1, -1), inclusive=True).reshape(share.shape)
            levels *= share.sum() / plan.num_q_blocks
            of_column, of_diagonal = (xp.where(xp.isneginf(x), x, np.inf) for x in (of_column, of_diagonal))
        else:
            levels = xp.full((plan.num_q_blocks, num_blocks), np.inf)
        of_diagonal = grid.range_minimum(of_diagonal, first - blocks, last - blocks)
        return grid.finish(xp.minimum(levels, xp.minimum(of_column[None], of_diagonal)), plan)

    return grid.each_head(q, k, plan, of_head)


def _coverage_levels(pooled: Any, values: Any, size: int, forced: int) -> Any:
    """The gamma from which each block is taken: the r-th best block (from 0) when covering needs size * r values.

    Covering gamma needs one value more than there are with a cumulative sum, largest first, of at most gamma.
    """
    xp = grid.module_of(pooled)
    pooled = pooled.copy()
    pooled[forced] = np.inf
    sums = xp.cumsum(-xp.sort(-values).astype(np.float64))
    by_rank = xp.full(len(pooled), np.inf)
    by_rank[0] = -np.inf
    needed = np.arange(1, len(pooled)) * size - 2  # index of the sum that must be at most gamma
    needed = needed[needed < len(values)]
    by_rank[1 : 1 + len(needed)] = sums[xp.asarray(needed)]
    return by_rank[grid.ranks(pooled)]


def _js_distance(p: Any, q: Any) -> Any:
    """The root of the Jensen-Shannon divergence of two distributions, natural logarithms."""
    xp = grid.module_of(p)
    middle = (p + q) / 2
    parts = [xp.where(x == 0, 0, x * xp.log(x / middle)) for x in (p, q)]
    return xp.sqrt(sum(0.5 * part.sum() for part in parts))


def xattention_levels(q: Any, k: Any, plan: Plan, stride: int) -> Any:
    """XAttention (Xu et al., arXiv 2503.16428, section 2 and algorithm 1): antidiagonals of stride x stride tiles.

    A tile's score is the sum of its antidiagonal over stride; softmax over the tiles of a row of tiles; a block holds
    the sum over its tiles. Blocks are taken largest first until the knob's share of the row is covered; the first key
    block and the diagonal always, and first. On the grid: block_q x block_k in place of 128x128.
    """

    def of_head(q, k, plan):
        xp = grid.module_of(q)
        queries, keys = _fold_rows(q, stride, True), _fold_rows(k, stride, False)
        scale = np.float32(plan.softmax_scale / stride)
        each, wide = plan.block_q // stride, plan.block_k // stride
        mass = xp.zeros((plan.num_q_blocks, plan.num_k_blocks), np.float32)
        tile = xp.arange(len(keys))[None]
        for block in range(plan.num_q_blocks):
            rows = xp.arange(block * each, min((block + 1) * each, len(queries)))
            # A tile is visible when one of its pairs is: rows of a tile end at row * stride + stride - 1.
            limit = (rows * stride + stride - 1 + plan.offset) // stride
            s = xp.where(tile <= limit[:, None], scale * (queries[rows] @ keys.T), -np.inf)
            mass[block] = grid.block_sums(grid.softmax(s), wide).sum(axis=0)
        visible = xp.asarray(grid.visible_blocks(plan))
        always = grid.diagonal_blocks(plan)
        always[:, 0] = True
        levels = grid.cumulative(xp.where(visible, mass, 0), xp.asarray(always) & visible)
        return grid.finish(levels, plan, always)

    return grid.each_head(q, k, plan, of_head)


def _fold_rows(x: Any, stride: int, reverse: bool) -> Any:
    """[ceil(seqlen / stride), stride * d]: stride rows side by side, in reverse where asked; absent rows are zeros."""
    xp = grid.module_of(x)
    padded = xp.zeros((-(-len(x) // stride) * stride, x.shape[1]), np.float32)
    padded[: len(x)] = x
    folded = padded.reshape(-1, stride, x.shape[1])
    return (folded[:, ::-1] if reverse else folded).reshape(len(folded), -1)


def sparge_levels(q: Any, k: Any, plan: Plan, similarity: float, by_count: bool) -> Any:
    """SpargeAttn (Zhang et al., arXiv 2502.18137, section 3.3 and algorithm 1): pooled means with self-similarity.

    k is smoothed. A block whose rows have a mean cosine similarity of at most ``similarity`` cannot be pooled and is
    always kept: a whole column for keys, a whole row for queries. The others' means give scores, softmax a row; blocks
    are kept, largest first, while their cumulative sum is at most the knob (``by_count``: while their number is at most
    the knob times num_k_blocks); the best of a row always. The second stage of the paper, which skips P.V inside the
    attention, is left out. On the grid: block_q x block_k in place of 128x64 (64x128 on sm_90).
    """

    def of_head(q, k, plan):
        xp = grid.module_of(q)
        k = k - k.mean(axis=0)
        similar_q, similar_k = (
            _self_similarity(x, size) > similarity for x, size in ((q, plan.block_q), (k, plan.block_k))
        )
        means_q, means_k = grid.block_means(q, plan.block_q), grid.block_means(k, plan.block_k)
        usable = xp.asarray(grid.visible_blocks(plan)) & similar_k[None]
        s = xp.where(usable, np.float32(plan.softmax_scale) * (means_q @ means_k.T), -np.inf)
        p = grid.softmax(s)
        place = grid.ranks(s)
        levels = (place + 1) / plan.num_k_blocks if by_count else grid.cumulative(p, inclusive=True)
        levels = xp.where(usable, levels, np.inf)
        levels = xp.where((place == 0) & usable, -np.inf, levels)
        levels = xp.where(similar_q[:, None] & similar_k[None], levels, -np.inf)
        return grid.finish(levels, plan)

    return grid.each_head(q, k, plan, of_head)


def _self_similarity(x: Any, size: int) -> Any:
    """float32 [blocks]: the mean cosine similarity of all pairs of a block's rows, own pairs included.

    The mean of the Gram matrix of unit rows is the squared length of their mean. A zero row gives NaN: not similar.
    """
    xp = grid.module_of(x)
    unit = x / xp.sqrt((x * x).sum(axis=1, keepdims=True))
    return (grid.block_means(unit, size) ** 2).sum(axis=1)


def quest_levels(q: Any, k: Any, plan: Plan) -> Any:
    """Quest (Tang et al., arXiv 2406.10774, section 3.3, algorithm 1): bounds from each page's least and largest key.

    A page's bound for a row is the sum over channels of max(q * min, q * max). A row keeps its best pages: the knob is
    how many. Quest is for decoding, one row a time; here a page is block_k keys (16 in the paper), and a block is kept
    when any of its rows keeps the page. Its floor of three pages and its two dense layers are left out.
    """

    def of_head(q, k, plan):
        xp = grid.module_of(q)
        levels = xp.full((plan.num_q_blocks, plan.num_k_blocks), np.inf, np.float32)
        low, high = (_page_bounds(k, plan.block_k, largest) for largest in (False, True))
        starts = xp.arange(plan.num_k_blocks) * plan.block_k
        for block in range(plan.num_q_blocks):
            rows = q[block * plan.block_q : (block + 1) * plan.block_q]
            seen = int(plan.visible_blocks[block])
            # q * max where q is positive, q * min where it is not; a NaN stays one in both.
            bound = xp.maximum(rows, 0) @ high[:seen].T + xp.minimum(rows, 0) @ low[:seen].T
            position = block * plan.block_q + xp.arange(len(rows)) + plan.offset
            visible = starts[None, :seen] <= position[:, None]
            place = xp.where(visible, grid.ranks(xp.where(visible, bound, -np.inf)) + 1, np.inf)
            levels[block, :seen] = place.min(axis=0)
        return grid.finish(levels, plan)

    return grid.each_head(q, k, plan, of_head)


def _page_bounds(k: Any, size: int, largest: bool) -> Any:
    """[pages, d]: the channels' largest or least values over each page's keys."""
    xp = grid.module_of(k)
    pages = -(-len(k) // size)
    padded = xp.full((pages * size, k.shape[1]), -np.inf if largest else np.inf, np.float32)
    padded[: len(k)] = k
    padded = padded.reshape(pages, size, -1)
    return padded.max(axis=1) if largest else padded.min(axis=1)


def blasst_levels(q: Any, k: Any, plan: Plan) -> Any:
    """BLASST (Yuan et al., arXiv 2512.12087, section 3): skips against the running maximum of the attention itself.

    Key blocks come from the first on. A block is skipped when for all its rows ``max s < m + ln(lambda)``, m the row's
    largest score in the blocks before; lambda is at most 1, so a skipped block never holds a new maximum. It saves the
    softmax and the product with v, never q.k. A row that may skip in a block that others keep is attended to here.
    """

    def of_head(q, k, plan):
        xp = grid.module_of(q)
        levels = xp.full((plan.num_q_blocks, plan.num_k_blocks), np.inf, np.float32)
        for block, s in grid.score_tiles(q, k, plan):
            top = s.max(axis=2)
            gap = xp.where(xp.isneginf(top), -np.inf, top - grid.running_maximum(top))
            of_block = -gap.max(axis=0)
            levels[block, : s.shape[1]] = xp.where(of_block <= 0, -np.inf, of_block)  # a maximum: no lambda skips it
        return grid.finish(levels, plan)

    return grid.each_head(q, k, plan, of_head)
