"""What the checks recompute in float64: on which query blocks, and how far float32 may be off."""

from __future__ import annotations

from typing import Any

import numpy as np

from salekit.checks import U32

MAX_BLOCKS = 16  # query blocks of a head whose bits are recomputed pair by pair on the twin


def sampled_blocks(num_q_blocks: int) -> np.ndarray:
    """Evenly spaced query blocks, the first and the last among them."""
    return np.unique(np.linspace(0, max(0, num_q_blocks - 1), min(MAX_BLOCKS, num_q_blocks)).astype(int))


def heads_first(x: Any) -> np.ndarray:
    """bshd -> float64 [batch, heads, seqlen, d]."""
    return np.ascontiguousarray(np.moveaxis(x, 1, 2).astype(np.float64))


def per_query_head(x: np.ndarray, plan) -> np.ndarray:
    return np.repeat(x, plan.group_size, axis=1)


def score_bound(q: np.ndarray, k: np.ndarray, plan) -> np.ndarray:
    """[batch, heads, seqlen_q]: how far a float32 score may be from the exact one.

    Products of 16-bit numbers are exact in float32; a sum of d of them in groups of four or more takes d/4 additions,
    each wrong by at most 2^-23 (tensor cores truncate) of sum |q_d k_d| <= |q| |k|.
    """
    norm_q = np.linalg.norm(heads_first(q), axis=-1)
    norm_k = np.linalg.norm(heads_first(k), axis=-1).max(axis=-1, initial=0.0)
    return plan.softmax_scale * (plan.head_dim / 4 + 2) * 2 * U32 * norm_q * per_query_head(norm_k, plan)[..., None]
