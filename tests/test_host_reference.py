"""The twin against a pair-by-pair float64 oracle, its own properties, and frozen masks of real activations."""

import hashlib

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salekit import reference
from salekit.block_mask import BlockMask
from salekit.codes import rows_to_tiles, tiles_to_rows
from salekit.data_files import load_sample
from salekit.plans import BLOCKS, ESTIMATORS, Plan


def make(nq, nk, heads=2, kv_heads=1, d=64, seed=0, dtype=np.float16, **options):
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((1, n, h, d)).astype(dtype) for n, h in ((nq, heads), (nk, kv_heads), (nk, kv_heads))
    )
    name = "float16" if dtype == np.float16 else "bfloat16"
    return q, k, v, Plan(1, nq, nk, heads, kv_heads, d, name, d**-0.5, dense_below=0, **options)


def dequantised_scores(quantized, plan, head):
    """float64 [seqlen_q, seqlen_k] of softmax_scale * (acc * sq * sk + c)."""
    kv = head // plan.group_size
    acc = quantized.q_codes[0, head].astype(np.float64) @ quantized.k_codes[0, kv].astype(np.float64).T
    rows, keys = np.arange(plan.seqlen_q), np.arange(plan.seqlen_k)
    if plan.estimator != "int4":
        return (
            plan.softmax_scale * acc * quantized.q_scale[0, head].astype(np.float64)[:, None] * quantized.k_scale[0, kv]
        )
    sq = quantized.q_scale[0, head][8 * (rows // 16) + rows % 8].astype(np.float64)[:, None]
    sk = quantized.k_scale[0, kv][4 * (keys // 32) + keys % 8 // 2].astype(np.float64)[None]
    correction = np.rint(quantized.correction[0, head].astype(np.float64)[None] / (sq * sk))
    return plan.softmax_scale * (acc + correction) * sq * sk


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 1), (70, 300), (300, 70), (257, 257), (129, 513)))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masks_are_the_oracles(estimator, lengths, causal):
    q, k, v, plan = make(*lengths, estimator=estimator, causal=causal, block_q=64)
    tau = 0.04
    quantized = reference.quantize(q, k, plan)
    out, lse, mask = reference.sparse_attention(q, k, v, tau, plan)
    smooth = k[0, :, 0].astype(np.float64) - k[0, :, 0].astype(np.float64).mean(0)
    for head in range(2):
        exact = plan.softmax_scale * q[0, :, head].astype(np.float64) @ smooth.T
        want = oracle.select(dequantised_scores(quantized, plan, head), exact, tau, causal, 64, 32)
        assert np.array_equal(mask.to_dense()[0, head], want)
        values = v[0, :, 0].astype(np.float64)
        o, expected_lse = oracle.attend(
            q[0, :, head].astype(np.float64),
            k[0, :, 0].astype(np.float64),
            values,
            want,
            plan.softmax_scale,
            causal,
            64,
            32,
        )
        # One rounding to float16 (2^-11) and float32 sums.
        assert np.abs(out[0, :, head].astype(np.float64) - o).max() <= 2.0**-10 * max(1, np.abs(values).max())
        assert np.array_equal(np.isneginf(lse[0, head]), np.isneginf(expected_lse))
        known = np.isfinite(expected_lse)
        assert np.abs(lse[0, head][known] - expected_lse[known]).max(initial=0) <= 1e-5
    if lengths == (129, 513):
        assert mask.density().max() < 0.9


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_coarse_masks_are_unions(estimator):
    q, k, v, plan = make(500, 700, estimator=estimator, block_q=64)
    fine = reference.sparse_attention(q, k, v, 0.35, plan)[2]
    assert fine.density().max() < 0.9
    for block_q, block_k in BLOCKS:
        coarse = reference.sparse_attention(q, k, v, 0.35, plan.replace(block_q=block_q, block_k=block_k))[2]
        assert np.array_equal(coarse.words, fine.coarsen(block_q, block_k).words)


def test_query_stride_tests_fewer_rows():
    q, k, v, plan = make(1500, 1500, full_rows=0)
    every = reference.sparse_attention(q, k, v, 0.2, plan)[2].to_dense()
    assert 0.2 < every.mean() < 0.9
    for stride in (2, 4):
        some = reference.sparse_attention(q, k, v, 0.2, plan.replace(query_stride=stride))[2].to_dense()
        assert (some <= every).all() and some.sum() < every.sum()
        whole = reference.sparse_attention(q, k, v, 0.2, plan.replace(query_stride=stride, full_rows=1500))[
            2
        ].to_dense()
        assert np.array_equal(whole, every)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_thresholds_at_the_ends(estimator):
    q, k, v, plan = make(400, 400, estimator=estimator)
    assert reference.sparse_attention(q, k, v, 0.0, plan)[2].density().min() == 1
    anchors = reference.sparse_attention(q, k, v, np.inf, plan)[2].to_dense()
    tiles = reference.anchor_blocks(plan)
    want = np.array([tiles[2 * i : 2 * i + 2].any(0) for i in range(plan.num_q_blocks)])
    assert (anchors == want).all()
    mixed = reference.sparse_attention(q, k, v, np.array([0, np.inf], np.float32), plan)[2].density()[0]
    assert mixed[0] == 1 and mixed[1] < 0.9


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("q", "k"))
def test_non_finite_comes_out_as_in_dense_attention(where, value, estimator):
    q, k, v, plan = make(400, 400, estimator=estimator)
    (q if where == "q" else k)[0, 150, 0, 3] = value
    out = reference.sparse_attention(q, k, v, np.inf, plan)[0].astype(np.float64)
    dense = reference.dense_attention(q, k, v, plan)[0].astype(np.float64)
    assert np.isnan(dense).any()
    assert np.array_equal(np.isnan(out), np.isnan(dense))


@given(
    st.integers(1, 140),
    st.integers(1, 200),
    st.sampled_from(ESTIMATORS),
    st.booleans(),
    st.sampled_from(BLOCKS),
    st.floats(1e-38, 6e4),
    st.integers(0, 2**16),
)
@settings(max_examples=25)
def test_any_magnitude(nq, nk, estimator, causal, block, magnitude, seed):
    q, k, v, plan = make(
        nq,
        nk,
        estimator=estimator,
        causal=causal,
        block_q=block[0],
        block_k=block[1],
        seed=seed,
        dtype=ml_dtypes.bfloat16,
    )
    q = (q.astype(np.float32) * magnitude).astype(q.dtype)
    out, lse, mask = reference.sparse_attention(q, k, v, 0.01, plan)
    dense = mask.to_dense()
    assert (dense <= mask.visible()).all()
    assert np.array_equal(BlockMask.from_dense(dense, *block, nq, nk, causal).words, mask.words)
    everything = reference.dense_attention(q, k, v, plan)[1]
    # Leaving keys out can only lower the sum.
    seen = np.isfinite(everything)
    assert (lse[seen] <= everything[seen] + 1e-3 * np.abs(everything[seen]) + 1e-3).all()


@pytest.mark.parametrize("bits, limit", ((4, 7), (8, 127)))
@pytest.mark.parametrize("d", (64, 128))
def test_tiles_hold_the_rows(d, bits, limit):
    rows = np.random.default_rng(0).integers(-limit, limit + 1, (2, 3, 200, d)).astype(np.int8)
    tiles = rows_to_tiles(rows, bits)
    assert tiles.shape == (2, 3, 2, 128 * d * bits // 8)
    assert np.array_equal(tiles_to_rows(tiles, bits, 200), rows)


FROZEN = {"int4": "cb7cb1d6e5c1081a", "int8": "5d713b635cc0bf77", "int8-sp24": "2b1ce9d8aa222422"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masks_of_real_activations_are_frozen(estimator):
    sample = load_sample()
    q, k, v = (sample[name][:, :2048] for name in "qkv")
    plan = Plan(1, 2048, 2048, 2, 1, 128, "bfloat16", 128**-0.5, estimator=estimator, dense_below=0)
    mask = reference.sparse_attention(q, k, v, 0.008, plan)[2]
    assert mask.density().max() < 0.9
    assert hashlib.sha256(np.ascontiguousarray(mask.words).tobytes()).hexdigest()[:16] == FROZEN[estimator]
