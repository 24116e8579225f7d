"""Skipped mass, estimated (beyond the paper): pooled keys and values of skipped blocks join the softmax.

For a query block with mean query q' and some skipped keys j, visible to all of its rows: with the weights
``w_j = softmax(softmax_scale * q'.k_j)`` the pooled key is ``sum w_j k_j``, the pooled value ``sum w_j v_j``, and the
pair joins the softmax of each row q like another key, its score raised by
``logsumexp(softmax_scale * q'.k_j) - softmax_scale * q'.(pooled key)`` and by a second order,
``softmax_scale^2 |q - q'|^2 s^2 / 2``, s^2 the variance of the k_j by those weights, the same for all channels, at most
MOST_VARIANCE. For q' itself both mass and value are the skipped keys' own. For any other row the first order is at most
their mass (Jensen's inequality), so the estimate exceeds it by a factor of exp(MOST_VARIANCE) at most. What it gains
and costs is measured in docs/skipped-mass.md.

A call with ``skipped="pool"`` has one pool for what is skipped of POOL_KEYS neighbours. q' is the mean of the block's
rows without a NaN or an infinity, rounded to q's type; elements of k and v that are not finite count as 0, and rows of
q that are not finite have no pools.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import arrays, jit, reference, tensor_map
from .attend_grid import expand_log2
from .block_mask import BlockMask
from .plans import Plan, ceil_div

MOST_VARIANCE = 1.0  # of the second order, in the exponent; MOST_SECOND_ORDER of tile/pools.cuh
POOL_KEYS = 128  # of tile/pools.cuh
STRIP = 128  # mean queries; POOL_STRIP of tile/pools.cuh
RUN = 8  # strips that a CTA takes one after the other; POOL_RUN of tile/pools.cuh
POOL_TILE = 32  # pools that attend_pools takes at a time
# Of the pools that are held at once; more are made and attended to in turns. At least a strip's: 528 MB at a million
# tokens and head_dim 128.
POOL_BYTES = 512 * 2**20

_POOL_THREADS = 128
_SM90_THREADS = 512
_UNIT = 64  # mean queries of a warpgroup; POOL_UNIT of pool_skipped_sm90.cu
_KEY_FACTS = POOL_KEYS + 4  # KEY_FACTS of tile/pools.cuh
_TERMS = np.dtype([("bias", "<f4"), ("spread", "<f4")])  # PoolTerms of tile/pools.cuh


# --- NumPy ---------------------------------------------------------------------------------------------------------
class Pools(NamedTuple):
    """Extra keys of a query block; float32."""

    key: np.ndarray  # [pools, head_dim]
    value: np.ndarray  # [pools, head_dim]
    bias: np.ndarray  # [pools], added to softmax_scale * q.key
    spread: np.ndarray  # [pools], s^2 / 2

    def scores(self, q: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """[rows, pools], of q and its mean, both times softmax_scale."""
        second_order = np.square(q - mean).sum(axis=1)[:, None] * self.spread
        return q @ self.key.T + self.bias + np.fmin(second_order, np.float32(MOST_VARIANCE))


def mean_query(q: np.ndarray) -> np.ndarray:
    """q' of a block's rows, [rows, head_dim], in q's type: the mean of those that are finite, 0 if none is."""
    rows = q.astype(np.float32)
    rows = rows[np.isfinite(rows).all(axis=1)]
    mean = rows.mean(axis=0) if len(rows) else np.zeros(q.shape[1], np.float32)
    return mean.astype(q.dtype)


def skipped_blocks(bits: np.ndarray, block: int, mask: BlockMask) -> np.ndarray:
    """Indices of the blocks of query block ``block`` that are skipped and that all of its rows see whole.

    bits: bool [num_k_blocks], the query block's row of the mask.
    """
    ends = np.minimum((np.arange(mask.num_k_blocks) + 1) * mask.block_k, mask.seqlen_k)
    seen = block * mask.block_q + mask.seqlen_k - mask.seqlen_q + 1 if mask.causal else mask.seqlen_k
    return np.flatnonzero(~bits & (ends <= seen))


def pool(
    mean: np.ndarray, keys: np.ndarray, values: np.ndarray, blocks: np.ndarray, block_k: int, blocks_each: int
) -> Pools:
    """Pools of these blocks, for a mean query (times softmax_scale); float32 [head_dim], [seqlen_k, head_dim].

    Neighbours, as far as they are among the blocks, share a pool: blocks 0 to blocks_each - 1, and so on.
    """
    groups, place = np.unique(blocks // blocks_each, return_inverse=True)
    member = np.zeros((len(groups), blocks_each), bool)
    member[place, blocks % blocks_each] = True
    index = groups[:, None] * (blocks_each * block_k) + np.arange(blocks_each * block_k)
    absent = (index >= len(keys)) | ~np.repeat(member, block_k, axis=1)
    index = np.where(absent, 0, index)
    k, v = (np.where(absent[..., None], np.float32(0), x[index]) for x in (keys, values))
    s = np.where(absent, np.float32(-np.inf), k @ mean)
    top = s.max(axis=1, keepdims=True)
    weight = np.exp(s - top)
    total = weight.sum(axis=1, keepdims=True)
    share = (weight / total)[:, None]
    key = (share @ k)[:, 0]
    variance = (share[:, 0] * np.square(k - key[:, None]).sum(axis=2)).sum(axis=1) / k.shape[2]
    return Pools(key, (share @ v)[:, 0], (top + np.log(total))[:, 0] - key @ mean, variance / 2)


def attend_with_pools(
    q: Any, k: Any, v: Any, mask: BlockMask, plan: Plan, blocks_each: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention over the selected blocks, as ``plan.attend`` says, and over pools of the skipped ones.

    q: [batch, seqlen_q, num_heads, head_dim]; k, v: [batch, seqlen_k, num_kv_heads, head_dim]; NumPy. mask: its own
        block counts, not the plan's. Blocks that only some rows of a query block see are not pooled (a mask of
        ``estimate`` selects them: they are anchors). blocks_each: what is skipped of so many neighbours shares a pool.

    Returns (out, lse): out like q; lse float32 [batch, num_heads, seqlen_q], natural log, of the selected keys' mass
    and the estimated one together. A row without a selected key or a pool has out 0 and lse -inf. Nothing is checked
    here.
    """
    out, lse = reference.attend(q, k, v, mask, plan)
    bits = mask.to_dense()
    scale = np.float32(plan.softmax_scale)
    for b, kv in np.ndindex(plan.batch, plan.num_kv_heads):
        keys, values = (np.ascontiguousarray(x[b, :, kv]).astype(np.float32) for x in (k, v))
        keys, values = (np.where(np.isfinite(x), x, np.float32(0)) for x in (keys, values))
        for head, block in np.ndindex(plan.group_size, mask.num_q_blocks):
            head += kv * plan.group_size
            blocks = skipped_blocks(bits[b, head, block], block, mask)
            if blocks.size == 0:
                continue
            rows = np.arange(block * mask.block_q, min((block + 1) * mask.block_q, plan.seqlen_q))
            mean = scale * mean_query(q[b, rows, head]).astype(np.float32)
            with np.errstate(all="ignore"):
                pools = pool(mean, keys, values, blocks, mask.block_k, blocks_each)
                s = pools.scores(scale * q[b, rows, head].astype(np.float32), mean)
                own = lse[b, head, rows][:, None]
                finite = np.isfinite(q[b, rows, head]).all(axis=1)
                top = np.fmax(s.max(axis=1, keepdims=True), own)
                p, keep = np.exp(s - top), np.exp(own - top)
                total = p.sum(axis=1, keepdims=True) + keep
                merged = (p @ pools.value + keep * out[b, rows, head].astype(np.float32)) / total
                out[b, rows[finite], head] = merged[finite].astype(q.dtype)
                lse[b, head, rows[finite]] = (top + np.log(total))[finite, 0]
    return out, lse


def blocks_of_a_pool(mask: BlockMask) -> int:
    """``blocks_each`` of a call with ``skipped="pool"``."""
    return POOL_KEYS // mask.block_k


# --- CUDA ----------------------------------------------------------------------------------------------------------
class Turn(NamedTuple):
    """Strips whose pools are held together. num_pools: that the last of their blocks sees; padded: room for a row."""

    first_strip: int
    num_strips: int
    num_pools: int
    padded: int

    @property
    def places(self) -> int:
        """Pools that there is room for."""
        return self.num_strips * STRIP * self.padded


def strips_of_kv_head(plan: Plan, block_q: int) -> int:
    return ceil_div(ceil_div(plan.seqlen_q, block_q) * plan.group_size, STRIP)


def turns(plan: Plan, block_q: int) -> list[Turn]:
    """Neighbouring strips, KV head by KV head, for as long as their pools fit POOL_BYTES."""
    queries = ceil_div(plan.seqlen_q, block_q) * plan.group_size
    strips = strips_of_kv_head(plan, block_q)
    last_blocks = (min((i + 1) * STRIP, queries) - 1 for i in range(strips))
    # Keys that all rows of a block see are those that its first row sees.
    pools = [ceil_div(plan.visible_keys(query // plan.group_size * block_q + 1), POOL_KEYS) for query in last_blocks]
    row_bytes = 4 * plan.head_dim + _TERMS.itemsize
    found: list[Turn] = []
    for strip in range(plan.batch * plan.num_kv_heads * strips):
        here = pools[strip % strips]
        if found:
            last = found[-1]
            most = max(last.num_pools, here)
            longer = Turn(last.first_strip, last.num_strips + 1, most, ceil_div(most, POOL_TILE) * POOL_TILE)
            if longer.places * row_bytes <= POOL_BYTES:
                found[-1] = longer
                continue
        found.append(Turn(strip, 1, here, ceil_div(here, POOL_TILE) * POOL_TILE))
    return [turn for turn in found if turn.num_pools]


def add_pools(q: Any, k: Any, v: Any, mask: BlockMask, plan: Plan, out: Any, lse: Any) -> None:
    """Make out and lse of the selected blocks those of the selected blocks and of pools of the skipped ones.

    q, out: [batch, seqlen_q, num_heads, head_dim]; k, v: [batch, seqlen_k, num_kv_heads, head_dim]; CuPy bshd views;
    lse: float32 [batch, num_heads, seqlen_q]. On the GPU alone; NumPy: :func:`attend_with_pools`.
    """
    steps = turns(plan, mask.block_q)
    if not steps:
        return
    num_q_blocks = ceil_div(plan.seqlen_q, mask.block_q)
    means = arrays.empty((plan.batch, plan.num_heads, num_q_blocks, plan.head_dim), q.dtype)
    jit.get_kernel(_mean_spec(plan, mask.block_q))(
        (num_q_blocks, plan.num_heads, plan.batch), (128,), (arrays.tensor_view(q), means, plan.shape_record)
    )
    places = max(turn.places for turn in steps)
    keys, values = (arrays.empty((places, plan.head_dim), q.dtype) for _ in range(2))
    terms = arrays.empty((places, 2), np.float32)
    shape = (plan.shape_record, np.float32(plan.softmax_scale))
    on_hopper = (plan.arch or jit.device_arch()) == "sm_90a" and all(tensor_map.can_encode(x) for x in (k, v))
    if on_hopper:
        facts = _measure_keys(k, v, plan)
    attending = jit.get_kernel(_attend_spec(plan, mask.block_q))
    for turn in steps:
        if on_hopper:
            _pool_sm90(k, v, mask, plan, turn, means, facts, keys, values, terms)
        else:
            jit.get_kernel(_pool_spec(plan, mask.block_q))(
                (turn.num_pools, ceil_div(turn.num_strips, RUN)), (_POOL_THREADS,),
                (
                    means, *(arrays.row_view(x) for x in (k, v)), mask.words, np.int32(expand_log2(mask)), keys, values,
                    terms, *shape, np.int32(turn.first_strip), np.int32(turn.num_strips), np.int32(turn.padded),
                ),
            )
        attending(
            (turn.num_strips * STRIP,), (mask.block_q,),
            (
                *(arrays.row_view(x) for x in (q, out)), lse, means, keys, values, terms, *shape,
                np.int32(turn.first_strip), np.int32(turn.padded),
            ),
        )


def _measure_keys(k: Any, v: Any, plan: Plan) -> Any:
    groups = ceil_div(plan.seqlen_k, POOL_KEYS)
    facts = arrays.empty((plan.batch, plan.num_kv_heads, groups, _KEY_FACTS), np.float32)
    jit.get_kernel(_facts_spec(plan))(
        (groups, plan.num_kv_heads, plan.batch), (128,),
        (*(arrays.tensor_view(x) for x in (k, v)), facts, np.int32(plan.seqlen_k)),
    )
    return facts


def _pool_sm90(k, v, mask: BlockMask, plan: Plan, turn: Turn, means, facts, keys, values, terms) -> None:
    rows = turn.num_strips * STRIP
    shape = (1, rows, turn.padded, plan.head_dim)
    pools = (x[: rows * turn.padded].reshape(shape) for x in (keys, values))
    items = ceil_div(turn.num_strips, RUN) * turn.num_pools
    jit.get_kernel(_pool_sm90_spec(plan, mask.block_q))(
        (min(items, jit.multiprocessors()),), (_SM90_THREADS,),
        (
            tensor_map.tensor_map(means.reshape(1, -1, 1, plan.head_dim), _UNIT),
            *(tensor_map.tensor_map(x, POOL_KEYS) for x in (k, v)),
            *(tensor_map.tensor_map(x, _UNIT) for x in pools),
            facts, mask.words, np.int32(expand_log2(mask)), terms, plan.shape_record, np.float32(plan.softmax_scale),
            *(np.int32(x) for x in (turn.first_strip, turn.num_strips, turn.num_pools, turn.padded)),
        ),
    )


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels that :func:`add_pools` launches for this plan."""
    hopper = (plan.arch or jit.device_arch()) == "sm_90a"
    pooling = [_facts_spec(plan), _pool_sm90_spec(plan, plan.block_q)] if hopper else []
    of_block = (spec(plan, plan.block_q) for spec in (_mean_spec, _pool_spec, _attend_spec))
    return [*pooling, *of_block]


def _mean_spec(plan: Plan, block_q: int) -> jit.KernelSpec:
    return jit.KernelSpec("mean_queries", _template(plan, block_q))


def _pool_spec(plan: Plan, block_q: int) -> jit.KernelSpec:
    return jit.KernelSpec("pool_skipped", _template(plan, block_q), f"PoolStorage<{plan.head_dim}>")


def _pool_sm90_spec(plan: Plan, block_q: int) -> jit.KernelSpec:
    return jit.KernelSpec("pool_skipped_sm90", _template(plan, block_q), f"PoolSm90Storage<{plan.head_dim}>")


def _facts_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("measure_keys", (str(plan.head_dim), plan.element))


def _attend_spec(plan: Plan, block_q: int) -> jit.KernelSpec:
    return jit.KernelSpec(
        "attend_pools", _template(plan, block_q), f"AttendPoolsStorage<{plan.head_dim}, {block_q}>"
    )


def _template(plan: Plan, block_q: int) -> tuple[str, ...]:
    return (str(plan.head_dim), str(block_q), plan.element)
