"""Calibration and mask-dump through the kernels, next to the twin."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from test_cli import salekit as run

import salekit
from salekit import calibration, call_checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("skipped", ["drop", "pool"])
@pytest.mark.parametrize("metric, target", [("relative_error", 0.1), ("recall", 0.95), ("density", 0.4)])
def test_calibration_follows_the_twin(metric, target, skipped):
    import cupy

    inputs = [salekit.load_sample()[name][:, :2048] for name in "qkv"]
    found = []
    for placed in (inputs, [cupy.asarray(x) for x in inputs]):
        plan = call_checks.make_plan(*placed, estimator="int8", dense_below=0, skipped=skipped)
        layer = calibration.Layer(*placed, plan)
        if metric == "density":
            found.append(calibration.calibrate_density(layer, target))
        else:
            found.append(calibration.calibrate(layer, metric, target))
    (_, twin), (tau, gpu) = found
    if metric == "density":
        assert gpu.density.mean() <= target
    else:
        assert calibration.meets(gpu, metric, target)[tau > 0].all()
    # A score near its threshold may fall on either side, and a bisection then goes another way by a step or two.
    assert np.abs(gpu.density - twin.density).max() <= 0.02
    assert np.abs(gpu.recall - twin.recall).max() <= 0.01
    assert np.abs(gpu.relative_error - twin.relative_error).max() <= 0.01


@pytest.mark.parametrize("options", [{}, {"estimator": "int8-sp24", "query_stride": 2}, {"estimator": "int4"}])
def test_32_heads_calibrate_in_little_time(options):
    """A second run, with every kernel compiled: 64 times fewer pairs than the 32K that shall take at most 3 s."""
    from salekit.workloads import llm_like_qkv

    q, k, v = llm_like_qkv(4096, cuda=True)
    plan = call_checks.make_plan(q, k, v, dense_below=0, **options)
    for metric, target in (("relative_error", 0.1), ("recall", 0.95)):
        calibration.calibrate(calibration.Layer(q, k, v, plan), metric, target)
        started = time.perf_counter()
        tau, measured = calibration.calibrate(calibration.Layer(q, k, v, plan), metric, target)
        seconds = time.perf_counter() - started
        assert calibration.meets(measured, metric, target)[tau > 0].all()
        assert measured.density.min() < 0.5 and seconds <= 1.0


def test_groups_of_heads():
    """Views of some heads give what the whole gives."""
    import cupy

    rng = np.random.default_rng(0)
    shapes = [(2, 1000, heads, 128) for heads in (6, 3, 3)]
    q, k, v = (cupy.asarray(rng.standard_normal(shape).astype(np.float16)) for shape in shapes)
    plan = call_checks.make_plan(q, k, v, dense_below=0)
    whole = calibration.calibrate(calibration.Layer(q, k, v, plan), "recall", 0.97)
    parts = calibration.Layer(q, k, v, plan, score_bytes=0)
    assert parts.num_groups == 3
    tau, measured = calibration.calibrate(parts, "recall", 0.97)
    assert np.array_equal(tau, whole[0])
    for name in ("density", "relative_error", "error", "recall"):
        np.testing.assert_allclose(getattr(measured, name), getattr(whole[1], name), rtol=1e-6)


@pytest.mark.parametrize("options", [(), ("--estimator", "int4", "--block", "64x64"), ("--seqlen", "1000")])
def test_validate_with_pools(options):
    report = json.loads(run("validate", "--skipped", "pool", "--tau", "0.05", "--json", *options).stdout)
    assert report["passed"] and report["backend"] == "cuda", report["checks"]
    pools = [check for check in report["checks"] if check["stage"] == "pool"]
    assert len(pools) == 3 and all(check["error"] <= check["bound"] for check in pools)
    assert all(head["pooled_output_error"] < head["relative_output_error"] for head in report["heads"])


def test_mask_dump_on_the_gpu():
    options = ("mask-dump", "--sample", "--estimator", "int8", "--json", "--backend")
    densities = [json.loads(run(*options, backend).stdout)["density"] for backend in ("numpy", "cuda")]
    assert np.abs(np.subtract(*densities)).max() <= 1e-3
