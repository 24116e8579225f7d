"""Calibration on the twin: targets are met, and tightly; a budget goes where it helps most."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import salekit
from salekit import calibration, call_checks
from salekit.errors import ArgumentError


@pytest.fixture(scope="module")
def layer():
    """Two real heads: what one needs few blocks for, the other needs many."""
    q, k, v = (salekit.load_sample()[name][:, :1000] for name in "qkv")
    plan = call_checks.make_plan(q, k, v, estimator="int8", block=(64, 32), dense_below=0, sink=32, local=32)
    return calibration.Layer(q, k, v, plan)


def test_measures_are_those_of_a_call(layer):
    tau = np.array([0.05, 0.01], np.float32)
    got = layer.measure(tau)
    options = dict(estimator="int8", block=(64, 32), sink=32, local=32, return_lse=True)
    out, lse, mask = salekit.sparse_attention(
        layer.q, layer.k, layer.v, thresholds=tau, dense_below=0, return_mask=True, **options
    )
    dense, dense_lse = salekit.dense_attention(layer.q, layer.k, layer.v, return_lse=True)
    difference = out.astype(np.float64) - dense
    np.testing.assert_allclose(got.density, mask.density()[0])
    assert (got.density < 0.97).all()
    np.testing.assert_allclose(got.error, np.abs(difference).sum(axis=(0, 1, 3)) / 1000, atol=1e-5)
    want = [np.linalg.norm(difference[:, :, h]) / np.linalg.norm(dense[:, :, h].astype(np.float64)) for h in range(2)]
    np.testing.assert_allclose(got.relative_error, want, atol=1e-5)
    # The mass of the selected blocks, pair by pair.
    bits = np.repeat(np.repeat(mask.to_dense()[0, 1], 64, 0), 32, 1)[:1000, :1000] & np.tri(1000, dtype=bool)
    scores = layer.q[0, :, 1].astype(np.float64) @ layer.k[0, :, 0].astype(np.float64).T / 128**0.5
    p = np.where(np.tri(1000, dtype=bool), np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
    mass = (p * bits).sum(axis=1) / p.sum(axis=1)
    assert got.recall[1] == pytest.approx(mass.mean(), abs=1e-5) and mass.mean() < 0.999


def test_pools_are_in_errors_and_not_in_recall(layer):
    pooled = calibration.Layer(layer.q, layer.k, layer.v, layer.plan.replace(skipped="pool"))
    tau = np.array([0.1, 0.05], np.float32)
    got, dropped = pooled.measure(tau), layer.measure(tau)
    assert np.array_equal(got.recall, dropped.recall) and np.array_equal(got.density, dropped.density)
    options = dict(estimator="int8", block=(64, 32), sink=32, local=32, dense_below=0, skipped="pool", return_lse=True)
    out, lse = salekit.sparse_attention(layer.q, layer.k, layer.v, thresholds=tau, **options)
    dense, dense_lse = salekit.dense_attention(layer.q, layer.k, layer.v, return_lse=True)
    difference = np.square(out.astype(np.float64) - dense).sum(axis=(0, 1, 3))
    want = np.sqrt(difference / np.square(dense.astype(np.float64)).sum(axis=(0, 1, 3)))
    np.testing.assert_allclose(got.relative_error, want, atol=1e-6)
    assert (got.relative_error < 0.9 * dropped.relative_error).all() and (got.error < dropped.error).all()
    assert (np.exp(lse - dense_lse).mean(axis=(0, 2)) > got.recall + 0.01).all()  # the estimate is left out
    # Thresholds for a recall are those without pools.
    ((_, group),) = pooled.groups()
    assert np.isnan(group.measure(group.mask(tau), ("recall",)).relative_error).all()
    assert np.isnan(group.measure(group.mask(tau), ("error",)).recall).all()
    for metric, target in (("recall", 0.95), ("relative_error", 0.1)):
        (mine, measured), (theirs, _) = (calibration.calibrate(x, metric, target) for x in (pooled, layer))
        assert np.array_equal(mine, theirs) if metric == "recall" else (mine > theirs).all()
        assert np.isfinite(measured.error).all() and calibration.meets(measured, metric, target).all()
    (mine, measured), (theirs, without) = (calibration.calibrate_density(x, 0.4) for x in (pooled, layer))
    assert np.array_equal(mine, theirs) and np.array_equal(measured.recall, without.recall)
    assert (measured.relative_error < without.relative_error).all()


@pytest.mark.parametrize("metric, target", [("relative_error", 0.1), ("error", 0.5), ("recall", 0.95)])
def test_targets_are_met_and_tight(layer, metric, target):
    ticks = []
    tau, measured = calibration.calibrate(layer, metric, target, lambda: ticks.append(1))
    assert len(ticks) == calibration.STEPS and tau.shape == (2,)
    met = calibration.meets(measured, metric, target)
    assert (met | (tau == 0)).all() and met.any()
    # A slightly larger tau fails, wherever tau is not at the end of its range.
    above = calibration.meets(layer.measure(tau * 1.05), metric, target)
    assert not (above & (tau > 0) & (tau < 4000)).any()
    if metric == "relative_error":
        assert measured.density.max() > measured.density.min() + 0.05  # heads differ, and get what they need


def test_targets_that_cannot_be_met(layer):
    tau, measured = calibration.calibrate(layer, "recall", 1.5)
    assert not tau.any() and (measured.density == 1).all() and (measured.recall > 0.999).all()
    tau, _ = calibration.calibrate(layer, "relative_error", 1e9)
    assert (tau > 4000).all()


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_density_is_spent_where_it_keeps_most(layer, budget):
    tau, measured = calibration.calibrate_density(layer, budget)
    sparsest = layer.measure(np.full(2, 4096)).density.mean()
    assert measured.density.mean() <= max(budget, sparsest) + 1e-9
    # No single tau for all heads within the budget keeps more.
    for uniform in np.exp2(np.linspace(*calibration.LOG2_RANGE, calibration.GRID)):
        other = layer.measure(np.full(2, uniform))
        if other.density.mean() <= budget:
            assert measured.recall.mean() >= other.recall.mean() - 0.01


def test_groups_of_heads_change_nothing():
    """Heads whose scores do not fit together are taken in turn."""
    rng = np.random.default_rng(0)
    shapes = [(2, 320, heads, 64) for heads in (6, 3, 3)]
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    plan = call_checks.make_plan(q, k, v, estimator="int8", dense_below=0, local=32)
    whole = calibration.Layer(q, k, v, plan)
    each = 4 * 2 * plan.num_q_blocks * plan.num_k_blocks * 2
    for score_bytes, groups in ((0, 3), (2 * each, 2)):
        layer = calibration.Layer(q, k, v, plan, score_bytes)
        assert layer.num_groups == groups and whole.num_groups == 1
        ticks = []
        for find, *target in ((calibration.calibrate, "recall", 0.95), (calibration.calibrate_density, 0.8)):
            ticks.clear()
            tau, measured = find(layer, *target, lambda: ticks.append(1))
            want_tau, want = find(whole, *target)
            assert np.array_equal(tau, want_tau)
            for name in ("density", "relative_error", "error", "recall"):
                np.testing.assert_allclose(getattr(measured, name), getattr(want, name), rtol=1e-6)
            assert len(ticks) == groups * (calibration.STEPS if len(target) == 2 else calibration.GRID)


def test_one_estimation_pass(layer, monkeypatch):
    """Scores once, estimate() for what is reported alone."""
    calls = {"block_scores": 0, "estimate": 0}
    for name in calls:
        real = getattr(calibration, name)

        def counted(*args, real=real, name=name):
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(calibration, name, counted)
    fresh = calibration.Layer(layer.q, layer.k, layer.v, layer.plan)
    calibration.calibrate(fresh, "recall", 0.9)
    calibration.calibrate_density(fresh, 0.5)
    assert calls["block_scores"] == 1 and 2 <= calls["estimate"] <= 3


def test_hull():
    cost, gain = np.array([0.1, 0.2, 0.3, 0.6]), np.array([0.5, 0.51, 0.9, 1.0])
    steps = calibration._hull(cost, gain)
    assert [end for _, end in steps] == [2, 3]
    assert steps[0][0] == pytest.approx(2) and steps[1][0] == pytest.approx(1 / 3)
    rng = np.random.default_rng(0)
    cost, gain = np.sort(rng.random(9)), np.sort(rng.random(9))
    slopes = [slope for slope, _ in calibration._hull(cost, gain)]
    assert all(a >= b for a, b in itertools.pairwise(slopes))


def test_bad_arguments(layer):
    with pytest.raises(ArgumentError, match="calibrate"):
        calibration.calibrate(layer, "speed", 1)
    with pytest.raises(ArgumentError, match="calibrate"):
        calibration.calibrate(layer, "recall", float("nan"))
    with pytest.raises(ArgumentError, match="density"):
        calibration.calibrate_density(layer, 1.5)
    with pytest.raises(ArgumentError, match="exact"):
        calibration.Layer(layer.q, layer.k, layer.v, layer.plan.replace(attend="int8-fp8"))
