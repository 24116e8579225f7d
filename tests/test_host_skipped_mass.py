"""Pooled keys of skipped blocks: key by key in float64, the bounds they promise, and what they do to real heads."""

import math

import ml_dtypes
import numpy as np
import pytest
from oracle import sees

import salekit
from salekit import reference, skipped_mass
from salekit.block_mask import BlockMask
from salekit.plans import Plan
from salekit.skipped_mass import attend_with_pools

CASES = {  # rows, keys, causal, block_q, block_k
    "square": (150, 150, True, 64, 32),
    "cached keys": (70, 301, True, 128, 32),
    "fewer keys than rows": (200, 90, True, 64, 32),
    "not causal": (130, 111, False, 128, 64),
    "one row": (1, 77, True, 64, 32),
}
HEADS, KV_HEADS, DIM = 4, 2, 64


def draw(rows, keys, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    shapes = [(2, rows, HEADS, DIM)] + 2 * [(2, keys, KV_HEADS, DIM)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return (spread * q).astype(np.float16), (k + 0.3).astype(np.float16), v.astype(np.float16)


def plan_of(rows, keys, causal, block_q, block_k):
    return Plan(2, rows, keys, HEADS, KV_HEADS, DIM, "float16", DIM**-0.5, causal, block_q=block_q, block_k=block_k)


def random_mask(plan, share=0.4, seed=1):
    """Bits of visible blocks; those that only some rows of a query block see are set, as estimate() sets them."""
    rng = np.random.default_rng(seed)
    bits = rng.random((2, HEADS, plan.num_q_blocks, plan.num_k_blocks)) < share
    starts, firsts = np.arange(plan.num_k_blocks) * plan.block_k, np.arange(plan.num_q_blocks) * plan.block_q
    ends = np.minimum(starts + plan.block_k, plan.seqlen_k)
    if plan.causal:
        bits |= ends[None] > firsts[:, None] + plan.offset + 1
    mask = BlockMask.from_dense(bits, plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal)
    return BlockMask.from_dense(
        bits & mask.visible(), plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal
    )


def oracle(q, k, v, bits, plan, blocks_each):
    """out, lse and sum p|v| of one head in float64, row by row and key by key."""
    nq, nk, scale = plan.seqlen_q, plan.seqlen_k, plan.softmax_scale
    out, lse, size = np.zeros((nq, DIM)), np.full(nq, -np.inf), np.zeros((nq, DIM))
    for block in range(plan.num_q_blocks):
        first, last = block * plan.block_q, min((block + 1) * plan.block_q, nq)
        mean = q[first:last].mean(axis=0).astype(np.float16).astype(np.float64)
        selected, skipped, pools = [], {}, []
        for j in range(plan.num_k_blocks):
            keys = range(j * plan.block_k, min((j + 1) * plan.block_k, nk))
            if bits[block, j]:
                selected += keys
            elif all(sees(first, key, nq, nk, plan.causal) for key in keys):
                skipped.setdefault(j // blocks_each, []).extend(keys)
        for keys in skipped.values():
            masses = [math.exp(scale * (mean @ k[key])) for key in keys]
            total = sum(masses)
            pooled = sum(mass * k[key] for mass, key in zip(masses, keys)) / total
            value = sum(mass * v[key] for mass, key in zip(masses, keys)) / total
            variance = sum(mass * np.sum((k[key] - pooled) ** 2) for mass, key in zip(masses, keys)) / total / DIM
            pools.append((math.log(total), pooled, value, variance))
        for i in range(first, last):
            seen = [key for key in selected if sees(i, key, nq, nk, plan.causal)]
            scores, values = [scale * (q[i] @ k[key]) for key in seen], [v[key] for key in seen]
            for log_total, pooled, value, variance in pools:
                second_order = scale**2 * np.sum((q[i] - mean) ** 2) * variance / 2
                scores.append(log_total + scale * ((q[i] - mean) @ pooled) + min(second_order, 1))
                values.append(value)
            if scores:
                p = np.exp(np.array(scores) - max(scores))
                out[i], lse[i] = p @ np.array(values) / p.sum(), max(scores) + math.log(p.sum())
                size[i] = p @ np.abs(values) / p.sum()
    return out, lse, size


@pytest.mark.parametrize("spread", (0.5, 2.0))  # the second order stays below its limit, or reaches it
@pytest.mark.parametrize("blocks_each", (1, 3))
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, blocks_each, spread):
    plan = plan_of(*CASES[case])
    q, k, v = draw(plan.seqlen_q, plan.seqlen_k, spread=spread)
    mask = random_mask(plan)
    out, lse = attend_with_pools(q, k, v, mask, plan, blocks_each)
    bits = mask.to_dense()
    for b, head in np.ndindex(2, HEADS):
        exact = (x.astype(np.float64)[b, :, h] for x, h in ((q, head), (k, head // 2), (v, head // 2)))
        theirs, their_lse, size = oracle(*exact, bits[b, head], plan, blocks_each)
        # float16 keeps 11 bits of the output, and of that over the selected keys; float32 sums of up to 301 products of
        # size 10 are off by 1e-5 at most. A mean query that rounds the other way in float32 moves a score by 2^-11.
        bound = 2.0**-11 * (np.abs(theirs) + size) + 1e-4
        assert np.all(np.abs(out[b, :, head].astype(np.float64) - theirs) <= bound)
        assert np.array_equal(np.isneginf(lse[b, head]), np.isneginf(their_lse))
        some = np.isfinite(their_lse)
        assert np.all(np.abs(lse[b, head, some] - their_lse[some]) <= 1e-5 * (1 + np.abs(their_lse[some])))


def test_everything_selected_is_dense_attention():
    plan = plan_of(150, 150, True, 64, 32)
    q, k, v = draw(150, 150)
    out, lse = attend_with_pools(q, k, v, random_mask(plan, share=2), plan)
    dense, dense_lse = reference.dense_attention(q, k, v, plan)
    assert np.abs(out.astype(np.float32) - dense.astype(np.float32)).max() <= 2.0**-9
    assert np.abs(lse - dense_lse).max() <= 1e-5


@pytest.mark.parametrize("blocks_each", (1, 4, 1000))
def test_a_block_of_equal_rows_loses_nothing(blocks_each):
    plan = plan_of(130, 600, True, 64, 32)
    q, k, v = draw(130, 600, spread=2.0)
    q = np.repeat(q[:, ::64], 64, axis=1)[:, :130]
    mask = random_mask(plan, share=0.2)
    dense, dense_lse = reference.dense_attention(q, k, v, plan)
    _, plain_lse = reference.attend(q, k, v, mask, plan)
    out, lse = attend_with_pools(q, k, v, mask, plan, blocks_each)
    assert np.abs(plain_lse - dense_lse).max() > 0.5  # there is much to lose
    assert np.abs(lse - dense_lse).max() <= 2e-5
    assert np.abs(out.astype(np.float32) - dense.astype(np.float32)).max() <= 2.0**-9


@pytest.mark.parametrize("spread", (0.3, 1.0, 4.0, 16.0))
def test_mass_is_overestimated_by_no_more_than_the_second_order(spread, monkeypatch):
    plan = plan_of(256, 700, True, 128, 32)
    q, k, v = draw(256, 700, spread=spread)
    mask = random_mask(plan, share=0.2)
    _, dense_lse = reference.dense_attention(q, k, v, plan)
    _, plain_lse = reference.attend(q, k, v, mask, plan)
    rounding = 1e-5 * (1 + np.abs(dense_lse))
    for most in (1.0, 0.0):  # without the second order never
        monkeypatch.setattr(skipped_mass, "MOST_VARIANCE", most)
        _, lse = attend_with_pools(q, k, v, mask, plan)
        assert np.all(lse <= dense_lse + most + rounding)
        assert np.all(lse >= plain_lse - rounding)
        assert (lse > plain_lse + rounding).any()


def test_error_of_real_heads_falls():
    sample = {name: x[:, :2048] for name, x in salekit.load_sample().items()}
    q, k, v = (sample[name] for name in "qkv")
    assert q.dtype == ml_dtypes.bfloat16
    plan = salekit.make_plan(q, k, v, estimator="int8", dense_below=0)
    _, _, mask = salekit.sparse_attention(
        q, k, v, thresholds=[0.5, 0.05], estimator="int8", dense_below=0, return_lse=True, return_mask=True
    )
    dense, plain, pooled = (
        x.astype(np.float64)
        for x in (
            reference.dense_attention(q, k, v, plan)[0],
            reference.attend(q, k, v, mask, plan)[0],
            attend_with_pools(q, k, v, mask, plan)[0],
        )
    )
    before, after = (np.sqrt(np.square(x - dense).sum(axis=(0, 1, 3))) for x in (plain, pooled))
    assert np.all(mask.density() < 0.4)
    assert np.all(after <= 2 / 3 * before)


@pytest.mark.parametrize("option", ({"softcap": 30.0}, {"window_size": 100}, {"sink_logits": [0.0] * HEADS}))
def test_options_that_pools_do_not_have(option):
    q, k, v = draw(300, 300)
    with pytest.raises(salekit.ArgumentError, match="pool"):
        salekit.sparse_attention(q, k, v, skipped="pool", dense_below=0, **option)


def test_head_dims_that_are_not_pooled():
    q, k, v = (np.zeros((1, 300, 2, 96), np.float16) for _ in range(3))
    with pytest.raises(salekit.ArgumentError, match="pool"):
        salekit.sparse_attention(q, k, v, skipped="pool", dense_below=0)
