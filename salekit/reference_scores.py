"""The NumPy twin of block scores: what decides each block's bit at any tau."""

from __future__ import annotations

import numpy as np

from . import reference
from .codes import Quantized
from .plans import KEY_BLOCK, TILE_ROWS, Plan, ceil_div

LARGEST = np.finfo(np.float32).max  # above ln(tau) of every finite tau


def relative_scores(products: np.ndarray, unit: np.ndarray, base: np.ndarray) -> np.ndarray:
    """products * unit - base, float32; the arguments broadcast. -inf in products is an absent one.

    base: m + ln(l) of the row; +inf never votes, -inf selects everything. A unit that is NaN passes every finite tau:
    the largest float. 0 times an infinite unit does not vote.
    """
    with np.errstate(all="ignore"):
        scores = np.minimum(products.astype(np.float32) * unit - base, LARGEST)
    scores = np.where(np.isnan(unit), LARGEST, np.where(np.isnan(scores), -np.inf, scores))
    scores = np.where(np.isneginf(base), np.inf, scores)
    return np.where(np.isposinf(base) | np.isneginf(products), -np.inf, scores).astype(np.float32)


def block_scores(quantized: Quantized, bases: np.ndarray, plan: Plan) -> np.ndarray:
    """float32 [batch, num_heads, num_q_blocks, num_k_blocks] (salekit.block_scores); bases [batch, heads, seqlen_q]."""
    num_blocks = ceil_div(plan.seqlen_k, KEY_BLOCK)
    scores = np.full((plan.batch, plan.num_heads, plan.num_q_tiles, num_blocks), -np.inf, np.float32)
    scale = np.float32(plan.softmax_scale)
    for b, head, rows, products in reference.row_products(quantized, plan):
        base = bases[b, head, rows][:, None]
        visible = reference.visible_pairs(rows, products.shape[1], plan)
        with np.errstate(all="ignore"):
            if plan.estimator == "int4":
                products, q_scale, k_scale = reference.corrected_products(products, quantized, rows, b, head, plan)
                best = relative_scores(np.where(visible, products, -np.inf), scale * q_scale * k_scale, base)
                best = best.reshape(rows.size, num_blocks, KEY_BLOCK).max(axis=2)
            else:  # one unit a row: the largest product decides
                unit = scale * quantized.q_scale[b, head, rows] * quantized.k_scale[b, head // plan.group_size]
                top = np.where(visible, products, -np.inf).reshape(rows.size, num_blocks, KEY_BLOCK).max(axis=2)
                best = relative_scores(top, unit[:, None], base)
        tiles = np.arange(0, rows.size, TILE_ROWS)
        scores[b, head, rows[0] // TILE_ROWS + np.arange(tiles.size)] = np.maximum.reduceat(best, tiles, axis=0)
    scores = np.where(reference.anchor_blocks(plan), np.float32(np.inf), scores)
    scores = np.where(reference.visible_blocks(plan), scores, np.float32(-np.inf))
    return reference.fold_blocks(scores, plan)
