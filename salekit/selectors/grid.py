"""What selectors share: scores tile by tile, blocks of the grid, and the order in which a family keeps them."""

from __future__ import annotations

from typing import Any, Iterator

import numpy as np

from .. import arrays, reference
from ..block_mask import BlockMask
from ..plans import Plan


def module_of(x: Any) -> Any:
    """numpy or cupy, whichever holds x."""
    return arrays.import_cupy() if arrays.is_cuda(x) else np


def head_rows(x: Any, batch: int, head: int) -> Any:
    """float32 [seqlen, head_dim], contiguous: one head of a bshd view."""
    xp = module_of(x)
    return xp.ascontiguousarray(x[batch, :, head].astype(np.float32))


def each_head(q: Any, k: Any, plan: Plan, levels_of_head: Any) -> Any:
    """float32 [batch, num_heads, num_q_blocks, num_k_blocks] from ``levels_of_head(q, k, plan)`` of one head each."""
    xp = module_of(q)
    levels = xp.empty((plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_k_blocks), np.float32)
    with np.errstate(all="ignore"):
        for b in range(plan.batch):
            for kv in range(plan.num_kv_heads):
                keys = head_rows(k, b, kv)
                for head in range(kv * plan.group_size, (kv + 1) * plan.group_size):
                    levels[b, head] = levels_of_head(head_rows(q, b, head), keys, plan)
    return levels


# --- the grid ------------------------------------------------------------------------------------------------------
def positions(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """int64 [num_q_blocks] each: the positions (row + offset) of a query block's first and last row."""
    first = np.arange(plan.num_q_blocks) * plan.block_q
    last = np.minimum(first + plan.block_q, plan.seqlen_q) - 1
    return first + plan.offset, last + plan.offset


def visible_blocks(plan: Plan) -> np.ndarray:
    """bool [num_q_blocks, num_k_blocks]: blocks with a visible pair."""
    return np.arange(plan.num_k_blocks)[None] < plan.visible_blocks[:, None]


def diagonal_blocks(plan: Plan) -> np.ndarray:
    """bool [num_q_blocks, num_k_blocks]: blocks that hold the own key of one of their rows."""
    first, last = (np.maximum(x, -1) // plan.block_k for x in positions(plan))
    blocks = np.arange(plan.num_k_blocks)[None]
    return (blocks >= first[:, None]) & (blocks <= last[:, None])


def anchor_blocks(plan: Plan) -> np.ndarray:
    """bool [num_q_blocks, num_k_blocks]: SALE's anchors."""
    return reference.fold_blocks(reference.anchor_blocks(plan)[None, None], plan)[0, 0]


def finish(levels: Any, plan: Plan, also: np.ndarray | None = None) -> Any:
    """levels with the diagonal (and the blocks of ``also``, and what is NaN) always kept, the invisible never."""
    xp = module_of(levels)
    always = diagonal_blocks(plan) if also is None else diagonal_blocks(plan) | also
    levels = xp.where(xp.isnan(levels) | xp.asarray(always), np.float32(-np.inf), levels)
    return xp.where(xp.asarray(visible_blocks(plan)), levels, np.float32(np.inf)).astype(np.float32)


# --- scores --------------------------------------------------------------------------------------------------------
def score_tiles(q: Any, k: Any, plan: Plan) -> Iterator[tuple[int, Any]]:
    """(query block, exact scores float32 [rows, visible key blocks, block_k]), -inf where a pair is not visible.

    One query block at a time: seqlen_q x seqlen_k scores are never held.
    """
    xp = module_of(q)
    for block in range(plan.num_q_blocks):
        rows = slice(block * plan.block_q, min((block + 1) * plan.block_q, plan.seqlen_q))
        seen = int(plan.visible_blocks[block])
        if seen == 0:
            continue
        s = xp.full((rows.stop - rows.start, seen * plan.block_k), -np.inf, np.float32)
        keys = k[: seen * plan.block_k]
        limit = xp.arange(rows.start, rows.stop)[:, None] + plan.offset
        s[:, : len(keys)] = xp.where(
            xp.arange(len(keys))[None] <= limit, np.float32(plan.softmax_scale) * (q[rows] @ keys.T), -np.inf
        )
        yield block, s.reshape(len(s), seen, plan.block_k)


def softmax(s: Any) -> Any:
    """Over the last axis; a row of -inf alone gives zeros."""
    xp = module_of(s)
    top = s.max(axis=-1, keepdims=True)
    p = xp.exp(s - xp.where(xp.isneginf(top), 0, top))
    total = p.sum(axis=-1, keepdims=True)
    return p / xp.where(total == 0, 1, total)


def last_rows(q: Any, k: Any, plan: Plan, count: int) -> Any:
    """float32 [rows, seqlen_k]: attention probabilities of the last ``count`` rows (all, where there are fewer)."""
    xp = module_of(q)
    rows = q[-count:]
    position = plan.seqlen_k - len(rows) + xp.arange(len(rows))
    s = np.float32(plan.softmax_scale) * (rows @ k.T)
    return softmax(xp.where(xp.arange(plan.seqlen_k)[None] <= position[:, None], s, -np.inf))


def diagonal_sums(p: Any) -> Any:
    """float32 [seqlen_k]: by distance, the sum of p [last rows, seqlen_k] over pairs of a row and a key so far back."""
    xp = module_of(p)
    rows, keys = p.shape
    sums = xp.zeros(keys, np.float32)
    for row in range(rows):
        position = keys - rows + row
        if position >= 0:
            sums[: position + 1] += p[row, : position + 1][::-1]
    return sums


def block_sums(x: Any, size: int) -> Any:
    """Sums of consecutive ``size`` entries along the last axis; the last block may be short."""
    xp = module_of(x)
    blocks = -(-x.shape[-1] // size)
    padded = xp.zeros((*x.shape[:-1], blocks * size), x.dtype)
    padded[..., : x.shape[-1]] = x
    return padded.reshape(*x.shape[:-1], blocks, size).sum(axis=-1)


def block_means(x: Any, size: int) -> Any:
    """[blocks, d]: means of consecutive ``size`` rows of x; the last block's is over the rows it has."""
    xp = module_of(x)
    counts = np.full(-(-len(x) // size), size)
    counts[-1] = len(x) - size * (len(counts) - 1)
    return block_sums(x.T, size).T / xp.asarray(counts, dtype=np.float32)[:, None]


# --- orders --------------------------------------------------------------------------------------------------------
def ranks(values: Any) -> Any:
    """int [..., n]: 0 for the largest of the last axis, ties by position; NaN counts as the largest."""
    xp = module_of(values)
    order = xp.argsort(xp.where(xp.isnan(values), -np.inf, -values), axis=-1, kind="stable")
    return xp.argsort(order, axis=-1, kind="stable")


def cumulative(weights: Any, first: Any = None, inclusive: bool = False) -> Any:
    """float64 like weights [rows, n]: the share of its row's weight that comes before each entry, largest first.

    first: bool, entries that come before all others. inclusive: the entry's own weight counts, too.
    """
    xp = module_of(weights)
    place = ranks(weights if first is None else xp.where(first, np.inf, weights))
    order = xp.argsort(place, axis=-1, kind="stable")
    total = xp.cumsum(xp.take_along_axis(weights, order, -1).astype(np.float64), axis=-1)
    share = total / xp.where(total[..., -1:] == 0, 1, total[..., -1:])
    if not inclusive:
        share = xp.concatenate([xp.zeros_like(share[..., :1]), share[..., :-1]], axis=-1)
    return xp.take_along_axis(share, place, -1)


def range_minimum(x: Any, first: np.ndarray, last: np.ndarray) -> Any:
    """min(x[first..last]), both ends included, for int arrays of one shape; what lies outside x counts as +inf.

    By minima over runs of powers of two, of which any range is the union of two.
    """
    xp = module_of(x)
    margin = int((last - first).max()) + 1
    low, high = max(0, -int(first.min())), max(0, int(last.max()) - len(x) + 1) + margin
    edge = [xp.full(n, np.inf, x.dtype) for n in (low, high)]
    table = [xp.concatenate([edge[0], x, edge[1]])]
    while 2 ** len(table) <= margin:
        run = 2 ** (len(table) - 1)
        longer = table[-1].copy()
        longer[:-run] = xp.minimum(table[-1][:-run], table[-1][run:])
        table.append(longer)
    power = np.log2(last - first + 1).astype(int)
    table = xp.stack(table)
    power, first, last = (xp.asarray(i) for i in (power, first + low, last + low + 1 - 2**power))
    return xp.minimum(table[power, first], table[power, last])


def running_maximum(x: Any) -> Any:
    """Along the last axis, the largest entry before each one; -inf for the first. (CuPy has no maximum.accumulate.)"""
    xp = module_of(x)
    top = xp.full_like(x, -np.inf)
    top[..., 1:] = x[..., :-1]
    step = 1
    while step < x.shape[-1]:
        top[..., step:] = xp.maximum(top[..., step:], top[..., :-step].copy())
        step *= 2
    return top


# --- masks ---------------------------------------------------------------------------------------------------------
def mask_at(levels: Any, limits: np.ndarray, plan: Plan) -> BlockMask:
    """The mask of the blocks whose level is at most ``limits``, float [num_heads], where the levels are."""
    xp = module_of(levels)
    bits = levels <= xp.asarray(np.asarray(limits, np.float32))[None, :, None, None]
    bits &= levels < np.inf
    padded = xp.zeros((*bits.shape[:-1], plan.num_words * 32), bool)
    padded[..., : plan.num_k_blocks] = bits
    words = xp.packbits(padded.ravel(), bitorder="little").view(np.uint32).reshape(plan.words_shape)
    return BlockMask(words, plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal)
