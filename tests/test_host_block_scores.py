"""Block scores on the twin: pair by pair in float64, and against the masks that estimate() gives."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import sees

import salekit
from salekit import call_checks, reference, reference_scores
from salekit.block_scores import rounding_bound
from salekit.errors import ArgumentError, DtypeError
from salekit.plans import BLOCKS, ESTIMATORS, Plan

CASES = {  # lengths and options; heads are 4 to 2 unless it says otherwise
    "square": ((300, 300), {}),
    "cached keys": ((130, 700), {}),
    "fewer keys than rows": ((400, 150), {}),
    "not causal": ((200, 333), {"causal": False}),
    "stride": ((500, 500), {"query_stride": 4, "full_rows": 70}),
    "stride, not causal": ((260, 300), {"query_stride": 2, "full_rows": 0, "causal": False}),
    "one row": ((1, 200), {}),
    "no anchors beside the diagonal": ((333, 333), {"sink": 0, "local": 0}),
}


def draw(lengths, heads=(4, 2), head_dim=64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(1, lengths[0], heads[0], head_dim)] + 2 * [(1, lengths[1], heads[1], head_dim)]
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    return q, k + np.float16(0.5), v


def hostile(lengths, seed=0):
    """Rows of q and one KV head that are not finite, zero rows, and a head whose scores are large."""
    q, k, v = draw(lengths, seed=seed)
    rows = lengths[0]
    q[0, ::5, 0] = 0
    q[0, :, 1] *= np.float16(30)
    q[0, rows // 3, 0] = np.nan
    q[0, rows // 2, 1, 3] = np.inf
    k[0, lengths[1] // 2, 1, 7] = -np.inf
    return q, k, v


def scores_of(q, k, plan):
    codes = salekit.quantize(q, k, plan)
    m, l = salekit.anchor_statistics(q, k, codes.k_mean, plan)
    return salekit.block_scores(codes, m, l, plan), codes, m, l


def by_pairs(codes, m, l, plan: Plan) -> np.ndarray:
    """The scores of the finite heads pair by pair in float64."""
    scores = np.full((plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_k_blocks), -np.inf)
    tested = reference.rows_that_vote(plan)
    for head in range(plan.num_heads):
        kv = head // plan.group_size
        for i in np.flatnonzero(tested):
            if not np.isfinite(m[0, head, i]):
                scores[0, head, i // plan.block_q] = np.inf
                continue
            for j in range(plan.seqlen_k):
                if not sees(i, j, plan.seqlen_q, plan.seqlen_k, plan.causal):
                    break
                product = codes.q_codes[0, head, i].astype(np.int64) @ codes.k_codes[0, kv, j].astype(np.int64)
                if plan.estimator == "int4":
                    unit = np.float64(codes.q_scale[0, head, 8 * (i // 16) + i % 8])
                    unit *= codes.k_scale[0, kv, 4 * (j // 32) + j % 8 // 2]
                    product += np.rint(codes.correction[0, head, j] / unit)
                else:
                    unit = np.float64(codes.q_scale[0, head, i]) * codes.k_scale[0, kv]
                score = plan.softmax_scale * unit * product - m[0, head, i] - np.log(l[0, head, i])
                at = 0, head, i // plan.block_q, j // plan.block_k
                scores[at] = max(scores[at], score)
    return scores


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", ["square", "cached keys", "fewer keys than rows", "stride, not causal"])
def test_pair_by_pair(case, estimator):
    lengths, options = CASES[case]
    lengths = tuple(min(length, 210) for length in lengths)
    q, k, v = draw(lengths, heads=(2, 1))
    plan = call_checks.make_plan(q, k, v, estimator=estimator, block=(64, 32), dense_below=0, local=16, **options)
    scores, codes, m, l = scores_of(q, k, plan)
    expected = by_pairs(codes, m, l, plan)
    anchors = reference.fold_blocks(reference.anchor_blocks(plan)[None, None], plan)[0, 0]
    assert np.isposinf(scores[..., anchors]).all()
    others = ~anchors
    assert np.array_equal(np.isneginf(scores[..., others]), np.isneginf(expected[..., others]))
    finite = others & np.isfinite(expected)
    # A rint of the int4 correction may fall on the other side of a tie: half a unit, at most .01 here.
    np.testing.assert_allclose(scores[finite], expected[finite], atol=0.01 if estimator == "int4" else 2e-5)


def check_against_estimate(q, k, v, plan: Plan, taus) -> int:
    """How many blocks differ between the two ways to a mask; each of them is within the bound."""
    scores, codes, m, l = scores_of(q, k, plan)
    with np.errstate(invalid="ignore"):
        base = np.abs(m + np.log(np.maximum(l, 1)))
    largest = base[np.isfinite(base)].max(initial=0)
    num_anchors = max(len(reference.anchor_keys(plan, tile)) for tile in range(plan.num_q_tiles))
    differing = 0
    for tau in taus:
        mask = salekit.mask_from_scores(scores, tau, plan)
        expected = salekit.estimate(codes, salekit.row_limits(m, l, codes, tau, plan), plan)
        wrong = mask.to_dense() != expected.to_dense()
        bound = rounding_bound(largest, tau, num_anchors)
        if tau in (0, np.inf):
            assert not wrong.any()
            continue
        assert bound < 1e-3 and (np.abs(scores[wrong] - np.log(tau)) <= bound).all()
        differing += int(wrong.sum())
    return differing


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_estimate(case, estimator):
    lengths, options = CASES[case]
    for q, k, v in (draw(lengths), hostile(lengths)):
        for block in BLOCKS if case == "square" else ((128, 32), (64, 64)):
            plan = call_checks.make_plan(q, k, v, estimator=estimator, block=block, dense_below=0, **options)
            check_against_estimate(q, k, v, plan, [0.0, 1e-6, 0.008, 0.3, 20.0, float("inf")])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_taus_at_a_score(estimator):
    """The tau of a block's own score: rounding decides that block, and none that is farther than the bound."""
    q, k, v = draw((400, 400), heads=(2, 1))
    plan = call_checks.make_plan(q, k, v, estimator=estimator, block=(64, 32), dense_below=0)
    scores = scores_of(q, k, plan)[0]
    finite = scores[np.isfinite(scores)]
    taus = np.exp(finite[np.linspace(0, finite.size - 1, 60).astype(int)].astype(np.float64)).astype(np.float32)
    check_against_estimate(q, k, v, plan, [float(tau) for tau in taus])


def test_what_is_always_and_never_selected():
    q, k, v = hostile((300, 300))
    plan = call_checks.make_plan(q, k, v, estimator="int8", block=(64, 32), dense_below=0, sink=0, local=0)
    scores = scores_of(q, k, plan)[0][0]
    visible = reference.fold_blocks(reference.visible_blocks(plan)[None, None], plan)[0, 0]
    assert np.isneginf(scores[:, ~visible]).all()
    assert np.isposinf(scores[2:, visible]).all()  # the KV head that holds an infinity
    assert np.isposinf(scores[0, 100 // 64, : 100 // 32]).all() and np.isposinf(scores[1, 150 // 64, : 150 // 32]).all()
    assert np.isfinite(scores[0, 3, :2]).all()


def test_larger_blocks_take_the_largest():
    q, k, v = draw((500, 700))
    fine = scores_of(q, k, call_checks.make_plan(q, k, v, estimator="int8", block=(128, 32), dense_below=0))[0]
    coarse = scores_of(q, k, call_checks.make_plan(q, k, v, estimator="int8", block=(128, 128), dense_below=0))[0]
    padded = np.full((*fine.shape[:3], 24), -np.inf, np.float32)
    padded[..., :22] = fine
    assert np.array_equal(coarse, padded.reshape(*fine.shape[:3], 6, 4).max(axis=-1))


def test_thresholds_per_head():
    q, k, v = draw((700, 700))
    plan = call_checks.make_plan(q, k, v, estimator="int8", dense_below=0)
    scores = scores_of(q, k, plan)[0]
    taus = [0.0, 0.3, float("inf"), float("nan")]
    mask = salekit.mask_from_scores(scores, taus, plan).to_dense()
    for head, tau in enumerate(taus):
        one = salekit.mask_from_scores(scores, 0.0 if np.isnan(tau) else tau, plan).to_dense()
        assert np.array_equal(mask[:, head], one[:, head])
    counts = mask.sum(axis=(0, 2, 3))
    assert counts[0] == counts[3] == plan.visible_blocks.sum() > counts[1] > counts[2]


def test_thresholds_are_one_or_one_a_head():
    q, k, v = draw((300, 300), heads=(2, 1))
    plan = call_checks.make_plan(q, k, v, estimator="int8", dense_below=0)
    scores = scores_of(q, k, plan)[0]
    for bad, error, match in (
        ([0.1, 0.2, 0.3], ArgumentError, r"got shape \(3,\); wants a scalar or \[num_heads\] = \(2,\)"),
        ([0.1], ArgumentError, r"got shape \(1,\)"),
        (np.ones((1, 2)), ArgumentError, r"got shape \(1, 2\)"),
        ([[0.1], [0.2, 0.3]], ArgumentError, "ragged"),
        (10**400, ArgumentError, "got 1000"),
        (None, DtypeError, "got NoneType"),
        ("0.1", DtypeError, "got str"),
        (["a", "b"], DtypeError, "got dtype"),
        (True, DtypeError, "got bool"),
        ([0.1, None], DtypeError, "got dtype object"),
    ):
        with pytest.raises(error, match="^thresholds: .*" + match):
            salekit.mask_from_scores(scores, bad, plan)
    words = [salekit.mask_from_scores(scores, tau, plan).words for tau in (
        0.3, np.array(0.3), [0.3, 0.3], np.array([0.3, 7, 0.3])[::2], np.array([0.3, 0.3])
    )]
    assert all(np.array_equal(words[0], other) for other in words)


def test_thresholds_beyond_float32():
    """They mean infinity, as to ``estimate``: even blocks that any finite tau selects are out."""
    plan = Plan(1, 64, 96, 2, 2, 64, "float16", 0.125, causal=False, block_q=64, block_k=32)
    most = np.finfo(np.float32).max
    scores = np.broadcast_to(np.array([most, np.inf, 700], np.float32), (1, 2, 1, 3))
    with np.errstate(all="raise"):
        for tau in (1e300, [1e39, 1e300], np.inf):
            mask = salekit.mask_from_scores(scores, tau, plan).to_dense()[0, :, 0]
            assert mask.tolist() == [[False, True, False]] * 2
    for tau in ([-1e300, np.nan], -1.0, 0):
        assert salekit.mask_from_scores(scores, tau, plan).to_dense().all()


def test_relative_scores():
    inf, nan = np.inf, np.nan
    products = np.array([3, -3, 5, -inf, 2, 2, 0, 2], np.float32)
    unit = np.array([2, 2, nan, 2, 2, 2, inf, inf], np.float32)
    base = np.array([1, 1, 1, -inf, -inf, inf, 1, 1], np.float32)
    most = float(np.finfo(np.float32).max)
    want = [5, -7, most, -inf, inf, -inf, -inf, most]
    assert reference_scores.relative_scores(products, unit, base).tolist() == want


def test_codes_in_another_form_are_refused():
    plan = Plan(1, 512, 512, 2, 1, 64, "float16", 0.125, query_stride=2, arch="sm_90a")
    assert not salekit.scores_plan(plan).holds_tested_rows
    for other in (plan, plan.replace(query_stride=1, estimator="int8-sp24")):
        with pytest.raises(ArgumentError, match="scores_plan"):
            salekit.block_scores(None, None, None, other)
