"""Block scores, masks from them and output differences on the GPU, against the twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_host_block_scores import CASES, draw, hostile, scores_of
from test_kernel_estimate import make_inputs, make_plan, poison_odd_groups, to_gpu

import salekit
from salekit import arrays, call_checks, jit, reference_scores
from salekit.block_mask import BlockMask
from salekit.block_scores import rounding_bound
from salekit.output_difference import output_sums
from salekit.plans import BLOCKS, ESTIMATORS, NATIVE_INT4_ARCHS

pytestmark = pytest.mark.gpu

FORMATS = [("int8", 8), ("int8-sp24", 8), ("int4", 4), ("int4", 8)]


def given(plan, seed=0):
    """Random codes, scales and bases, with rows that select everything and rows that never vote."""
    quantized, limits = make_inputs(plan, seed)
    rng = np.random.default_rng(seed + 1)
    if plan.estimator != "int4":
        quantized = replace(
            quantized,
            q_scale=rng.uniform(0.01, 0.02, limits.shape).astype(np.float32),
            k_scale=rng.uniform(0.01, 0.02, (plan.batch, plan.num_kv_heads)).astype(np.float32),
        )
    bases = rng.normal(0, 3, limits.shape).astype(np.float32)
    bases[:, -1][rng.random(bases[:, -1].shape) < 0.01] = -np.inf
    return quantized, bases


def check(plan, code_bits, inputs=None, seed=0):
    """The kernel's scores are the twin's bits when it gets the same codes, scales, corrections and bases."""
    import cupy

    if code_bits == 4 and jit.device_arch() not in (*NATIVE_INT4_ARCHS, "sm_90a"):
        pytest.skip("packed int4 codes are not used on this GPU")
    plan = plan.replace(arch="sm_80")  # codes of all rows, in tiles
    quantized, bases = inputs or given(plan, seed)
    m, l = bases, np.ones_like(bases)  # m + ln(1) is m, exactly
    expected = salekit.block_scores(quantized, m, l, plan)
    tiles, _ = to_gpu(quantized, bases, plan, code_bits)
    if plan.estimator != "int4":
        q_scale = np.full((*bases.shape[:2], plan.padded_q), np.nan, np.float32)
        q_scale[..., : plan.seqlen_q] = quantized.q_scale
        tiles = replace(tiles, q_scale=cupy.asarray(q_scale), k_scale=cupy.asarray(quantized.k_scale))
    poison = cupy.empty(expected.size, np.float32)
    poison.data.memset(0xA5, poison.nbytes)
    del poison
    got = salekit.block_scores(tiles, cupy.asarray(m), cupy.asarray(l), plan).get()
    assert got.dtype == np.float32 and got.shape == expected.shape
    wrong = np.argwhere(got != expected)
    assert not wrong.size, (
        f"{len(wrong)} of {got.size} scores differ; first at {wrong[0]}: "
        f"got {got[tuple(wrong[0])]}, expected {expected[tuple(wrong[0])]}"
    )


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("form", FORMATS)
def test_shapes(form, head_dim, block_q):
    for index, seqlen in enumerate((1, 31, 33, 63, 65, 127, 129, 255, 1000, 2049)):
        for causal in (True, False):
            plan = make_plan(form[0], seqlen, seqlen, head_dim=head_dim, block_q=block_q, causal=causal)
            check(plan, form[1], seed=index)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("form", FORMATS)
def test_blocks_and_lengths(form, block):
    for lengths in ((1000, 1000), (130, 4200), (1, 1), (65, 2081), (700, 690), (1000, 31)):
        for causal in (True, False):
            check(make_plan(form[0], *lengths, block_q=block[0], block_k=block[1], causal=causal), form[1])


@pytest.mark.parametrize("form", FORMATS)
def test_groups_strides_and_anchors(form):
    for options in (
        {"batch": 2, "heads": 8, "kv_heads": 2},
        {"heads": 3, "kv_heads": 3, "sink": 0, "local": 0},
        {"heads": 4, "sink": 100, "local": 1000},
        {"query_stride": 2, "full_rows": 100},
        {"query_stride": 4, "full_rows": 0, "block_q": 64, "causal": False},
        {"block_k": 128, "query_stride": 4, "full_rows": 300},
    ):
        check(make_plan(form[0], 515, 777, **options), form[1])


@pytest.mark.parametrize("form", [form for form in FORMATS if form[0] == "int4"])
def test_odd_groups(form):
    """NaN, infinite and vanishing scales, corrections beyond the clamp."""
    for causal in (True, False):
        plan = make_plan("int4", 300, 1300, heads=3, causal=causal, full_rows=0)
        quantized, bases = given(plan)
        poison_odd_groups(quantized, np.zeros(1, np.float32))
        check(plan, form[1], inputs=(quantized, bases))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", CASES)
def test_scores_of_inputs(case, estimator):
    """From q and k on: within rounding of the twin's, infinite where they are; masks are those of estimate."""
    import cupy

    lengths, options = CASES[case]
    for q, k, v in (draw(lengths, head_dim=128), hostile(lengths)):
        on_gpu = [cupy.asarray(x) for x in (q, k, v)]
        options = dict(options, estimator=estimator, block=(64, 32), dense_below=0)
        expected, *_ = scores_of(q, k, call_checks.make_plan(q, k, v, **options))
        plan = call_checks.make_plan(*on_gpu, **options)
        codes = salekit.quantize(*on_gpu[:2], plan)
        statistics = salekit.anchor_statistics(*on_gpu[:2], codes.k_mean, plan)
        scores_codes = salekit.quantize(*on_gpu[:2], salekit.scores_plan(plan))
        scores = salekit.block_scores(scores_codes, *statistics, salekit.scores_plan(plan))
        got = scores.get()
        for infinite in (np.isposinf, np.isneginf):
            assert np.array_equal(infinite(got), infinite(expected))
        finite = np.isfinite(got) & (got < reference_scores.LARGEST)
        assert np.array_equal(finite, np.isfinite(expected) & (expected < reference_scores.LARGEST))
        # A mean that differs in its last bit moves a code by one, in rare cases and in one dimension.
        differences = np.abs(got[finite] - expected[finite]) / np.maximum(1, np.abs(expected[finite]))
        assert not finite.any() or (np.quantile(differences, 0.9) <= 1e-3 and differences.max() <= 5)
        for tau in (0.0, 0.008, 0.3, float("inf")):
            mask = salekit.mask_from_scores(scores, tau, salekit.scores_plan(plan)).to_dense()
            limits = salekit.row_limits(*statistics, codes, tau, plan)
            wrong = mask != salekit.estimate(codes, limits, plan).to_dense()
            if tau in (0.0, float("inf")):
                assert not wrong.any()
            else:
                bound = rounding_bound(np.abs(got[finite]).max(initial=0) + 100, tau, 400)
                assert (np.abs(got[wrong] - np.log(tau)) <= bound).all()


@pytest.mark.parametrize("blocks", [(128, 32, 1000, 1300), (64, 64, 65, 5000), (128, 128, 1, 1), (64, 32, 640, 2048)])
def test_masks_of_scores(blocks):
    """Scores of blocks that no row of theirs sees are drawn, too: they do not count."""
    import cupy

    plan = make_plan("int8", blocks[2], blocks[3], batch=2, heads=3, block_q=blocks[0], block_k=blocks[1])
    rng = np.random.default_rng(0)
    scores = rng.normal(-3, 2, (2, 3, plan.num_q_blocks, plan.num_k_blocks)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = np.inf
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    for taus in (0.05, [0.0, 0.2, float("inf")], [float("nan"), 1e-9, -1.0]):
        with np.errstate(invalid="ignore"):
            expected = salekit.mask_from_scores(scores, taus, plan)
            got = salekit.mask_from_scores(cupy.asarray(scores), taus, plan)
        assert isinstance(got, BlockMask) and np.array_equal(got.words.get(), expected.words)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_output_sums(dtype):
    import cupy

    rng = np.random.default_rng(0)
    for batch, seqlen, heads, head_dim in ((1, 1, 1, 64), (2, 515, 6, 64), (1, 1000, 4, 128)):
        plan = make_plan("int8", seqlen, seqlen, batch=batch, heads=heads, head_dim=head_dim).replace(dtype=dtype)
        shape = (batch, seqlen, heads, head_dim)
        dense = rng.standard_normal(shape).astype(np.float32).astype(arrays.BFLOAT16 if dtype == "bfloat16" else dtype)
        out = (dense.astype(np.float32) + rng.normal(0, 0.1, shape)).astype(dense.dtype)
        dense_lse = rng.normal(0, 3, (batch, heads, seqlen)).astype(np.float32)
        lse = dense_lse - rng.exponential(0.2, dense_lse.shape).astype(np.float32) + np.float32(0.01)
        dense_lse[..., ::7] = -np.inf
        lse[..., ::7] = -np.inf
        host = out, lse, dense, dense_lse
        device = [cupy.asarray(x) for x in host]
        for got, want in zip(output_sums(*device, plan), output_sums(*host, plan)):
            np.testing.assert_allclose(got, want, rtol=1e-5)
        if heads > 2:  # some heads of a larger array
            part = slice(2, heads)
            cut = lambda out, lse, *rest: (out[:, :, part], lse[:, part], *(cut(*rest) if rest else ()))  # noqa: E731
            cut_sums = output_sums(*cut(*device), plan.replace(num_heads=heads - 2))
            for got, want in zip(cut_sums, output_sums(*host, plan)):
                np.testing.assert_allclose(got, want[part], rtol=1e-5)
        device[0][-1, -1, -1, -1] = np.nan
        assert np.isnan(output_sums(*device, plan).squares).tolist() == [False] * (heads - 1) + [True]
