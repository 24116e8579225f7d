"""Attention that estimates what the mask skips: pooled keys and values of skipped blocks (beyond the paper).

A NumPy reference; no kernel does this yet. What it gains and costs is measured in docs/skipped-mass.md.

For a query block with mean query q' and a skipped block of keys j, visible to all of its rows: with the weights
``w_j = softmax(softmax_scale * q'.k_j)`` the pooled key is ``sum w_j k_j``, the pooled value ``sum w_j v_j``, and the
pair joins the softmax of each row q like another key, its score raised by
``logsumexp(softmax_scale * q'.k_j) - softmax_scale * q'.(pooled key)`` and by a second order,
``softmax_scale^2 |q - q'|^2 s^2 / 2``, s^2 the variance of the k_j by those weights, the same for all channels, at most
MOST_VARIANCE. For q' itself both mass and value are the skipped keys' own. For any other row the first order is at most
their mass (Jensen's inequality), so the estimate exceeds it by a factor of exp(MOST_VARIANCE) at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .block_mask import BlockMask
from .plans import Plan

MOST_VARIANCE = 1.0  # of the second order, in the exponent


class Pools(NamedTuple):
    """Extra keys of a query block; float32."""

    key: np.ndarray  # [pools, head_dim]
    value: np.ndarray  # [pools, head_dim]
    bias: np.ndarray  # [pools], added to softmax_scale * q.key
    spread: np.ndarray  # [pools], s^2 / 2
    mean: np.ndarray  # [head_dim], softmax_scale * q'

    def scores(self, q: np.ndarray) -> np.ndarray:
        """[rows, pools], of q times softmax_scale."""
        second_order = np.square(q - self.mean).sum(axis=1)[:, None] * self.spread
        return q @ self.key.T + self.bias + np.minimum(second_order, np.float32(MOST_VARIANCE))


def skipped_blocks(bits: np.ndarray, block: int, mask: BlockMask) -> np.ndarray:
    """Indices of the blocks of query block ``block`` that are skipped and that all of its rows see whole.

    bits: bool [num_k_blocks], the query block's row of the mask.
    """
    ends = np.minimum((np.arange(mask.num_k_blocks) + 1) * mask.block_k, mask.seqlen_k)
    seen = block * mask.block_q + mask.seqlen_k - mask.seqlen_q + 1 if mask.causal else mask.seqlen_k
    return np.flatnonzero(~bits & (ends <= seen))


def pool(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, blocks: np.ndarray, block_k: int, blocks_each: int
) -> Pools:
    """Pools of these blocks, for the mean of q (times softmax_scale); float32 [rows, head_dim], [seqlen_k, head_dim].

    Neighbours, as far as they are among the blocks, share a pool: blocks 0 to blocks_each - 1, and so on.
    """
    groups, place = np.unique(blocks // blocks_each, return_inverse=True)
    member = np.zeros((len(groups), blocks_each), bool)
    member[place, blocks % blocks_each] = True
    index = groups[:, None] * (blocks_each * block_k) + np.arange(blocks_each * block_k)
    absent = (index >= len(keys)) | ~np.repeat(member, block_k, axis=1)
    index = np.where(absent, 0, index)
    k, v = (np.where(absent[..., None], np.float32(0), x[index]) for x in (keys, values))
    mean = q.mean(axis=0)
    s = np.where(absent, np.float32(-np.inf), k @ mean)
    top = s.max(axis=1, keepdims=True)
    weight = np.exp(s - top)
    total = weight.sum(axis=1, keepdims=True)
    share = (weight / total)[:, None]
    key = (share @ k)[:, 0]
    variance = (share[:, 0] * np.square(k - key[:, None]).sum(axis=2)).sum(axis=1) / k.shape[2]
    return Pools(key, (share @ v)[:, 0], (top + np.log(total))[:, 0] - key @ mean, variance / 2, mean)


def attend_with_pools(
    q: Any, k: Any, v: Any, mask: BlockMask, plan: Plan, blocks_each: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention over the selected blocks and pools of the skipped ones, query block by query block.

    q: [batch, seqlen_q, num_heads, head_dim]; k, v: [batch, seqlen_k, num_kv_heads, head_dim]; NumPy. mask: its own
        block counts, not the plan's. Blocks that only some rows of a query block see are not pooled (a mask of
        ``estimate`` selects them: they are anchors). blocks_each: what is skipped of so many neighbours shares a pool.

    Returns (out, lse): out like q; lse float32 [batch, num_heads, seqlen_q], natural log, of the selected keys' mass
    and the estimated one together. A row without a selected key or a pool has out 0 and lse -inf. A value that is not
    finite reaches the output from skipped blocks too, as in dense attention. Nothing is checked here.
    """
    out = np.zeros(q.shape, q.dtype)
    lse = np.full((plan.batch, plan.num_heads, plan.seqlen_q), -np.inf, np.float32)
    bits = mask.to_dense()
    scale = np.float32(plan.softmax_scale)
    for b, kv in np.ndindex(plan.batch, plan.num_kv_heads):
        keys, values = (np.ascontiguousarray(x[b, :, kv]).astype(np.float32) for x in (k, v))
        for head in range(kv * plan.group_size, (kv + 1) * plan.group_size):
            for block in range(mask.num_q_blocks):
                rows = np.arange(block * mask.block_q, min((block + 1) * mask.block_q, plan.seqlen_q))
                seen = rows + plan.offset + 1 if plan.causal else np.full(rows.shape, plan.seqlen_k)
                of = bits[b, head, block]
                cols = np.flatnonzero(np.repeat(of, mask.block_k)[: max(0, seen.max())])
                queries = scale * q[b, rows, head].astype(np.float32)
                pools = pool(queries, keys, values, skipped_blocks(of, block, mask), mask.block_k, blocks_each)
                if cols.size + pools.bias.size == 0:
                    continue
                with np.errstate(all="ignore"):
                    exact = np.where(cols < seen[:, None], queries @ keys[cols].T, np.float32(-np.inf))
                    s = np.concatenate([exact, pools.scores(queries)], axis=1)
                    top = s.max(axis=1, keepdims=True)
                    p = np.exp(s - np.where(np.isneginf(top), np.float32(0), top))
                    total = p.sum(axis=1, keepdims=True)
                    some = ~(total == 0)
                    weighted = p[:, : cols.size] @ values[cols] + p[:, cols.size :] @ pools.value
                    out[b, rows, head] = np.where(some, weighted / total, 0).astype(q.dtype)
                    lse[b, head, rows] = np.where(some, top + np.log(total), -np.inf)[:, 0]
    return out, lse
