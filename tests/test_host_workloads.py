"""The generator of LLM-like q, k, v: what it promises about densities, found by running the twin's estimation."""

import numpy as np
import pytest

from salekit import reference, workloads
from salekit.call_checks import make_plan

SEQLEN = 8192


def free_density(q, k, v, estimator="int8"):
    """float64 [heads]: selected share of the visible 128x32 blocks that are no anchors."""
    plan = make_plan(q, k, v, estimator=estimator, dense_below=0)
    quantized = reference.quantize(q, k, plan)
    y = reference.row_limits(*reference.anchor_statistics(q, k, quantized.k_mean, plan), workloads.TAU, plan)
    if estimator != "int4":
        k_scale = quantized.k_scale.repeat(plan.group_size, axis=1)[:, :, None]
        y = reference.integer_thresholds(y, quantized.q_scale, k_scale, plan)
    mask = reference.estimate(quantized, y, plan)
    fine = reference.anchor_blocks(plan)
    anchors = fine.reshape(plan.num_q_blocks, 2, -1).any(axis=1)
    free = mask.visible() & ~anchors
    return (mask.to_dense()[0] & free).sum(axis=(1, 2)) / free.sum()


def test_densities_follow_the_targets():
    # 4 heads stand for the 32 by quantiles: sparse, two in the middle, dense.
    q, k, v = workloads.llm_like_qkv(SEQLEN, 4, 1, 128, seed=3)
    target = np.array(workloads.target_densities())[workloads.profiles_of(4)]
    measured = free_density(q, k, v)
    # 64 query blocks share most of a head's direction and see 256 key blocks: about 256 draws of a share p decide;
    # three standard deviations, and 10% for int8 and for the fit.
    tolerance = 3 * np.sqrt(target * (1 - target) / 256) + 0.1 * target
    assert (np.abs(measured - target) <= tolerance).all(), (measured, target)
    assert np.ptp(measured) > 0.5


@pytest.mark.parametrize("profile", [0, 7, 13, 28])
def test_sink_scores_are_what_the_fit_finds(profile):
    target = workloads.target_densities()[profile]
    found = workloads.sink_score_for(target, query_blocks=12, seed=5)
    # Another, smaller sample of the same bisection.
    assert abs(found - workloads.sink_scores()[profile]) <= 0.5


def test_mean_target_is_that_of_the_real_masks():
    share = workloads.anchor_share(workloads.REAL_SEQLEN)
    total = np.array(workloads.target_densities()) * (1 - share) + share
    np.testing.assert_allclose(total, workloads.REAL_DENSITIES, atol=1e-12)
    assert abs(total.mean() - 0.223) <= 0.0005


def test_anchor_share_counts_the_twins_anchors():
    x = np.zeros((1, 1000, 1, 64), np.float16)
    plan = make_plan(x, x, x)
    fine = reference.anchor_blocks(plan)
    anchors = fine.reshape(plan.num_q_blocks, 2, -1).any(axis=1)
    assert workloads.anchor_share(1000) == pytest.approx(anchors.sum() / plan.visible_blocks.sum())


@pytest.mark.parametrize("head_dim, dtype", [(64, "float16"), (128, "bfloat16")])
def test_shapes_dtypes_and_seed(head_dim, dtype):
    shape = dict(num_heads=6, num_kv_heads=3, head_dim=head_dim, dtype=dtype, batch=2, seqlen_q=200)
    q, k, v = workloads.llm_like_qkv(333, **shape, seed=1)
    again = workloads.llm_like_qkv(333, **shape, seed=1)
    other = workloads.llm_like_qkv(333, **shape, seed=2)
    assert q.shape == (2, 200, 6, head_dim) and k.shape == v.shape == (2, 333, 3, head_dim)
    for x, y, z in zip((q, k, v), again, other):
        assert str(x.dtype) == dtype and x.flags.c_contiguous
        assert np.isfinite(x.astype(np.float32)).all()
        assert (x == y).all() and not (x == z).all()


def test_profiles():
    assert workloads.profiles_of(64).tolist() == list(range(32)) * 2
    few = np.array(workloads.REAL_DENSITIES)[workloads.profiles_of(8)]
    assert (np.diff(few) >= 0).all() and few[0] < 0.02 and few[-1] > 0.9
