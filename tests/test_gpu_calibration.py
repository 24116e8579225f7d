"""Calibration and mask-dump through the kernels, next to the twin."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_cli import salekit as run

import salekit
from salekit import arrays, calibration

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("metric, target", [("relative_error", 0.1), ("recall", 0.95), ("density", 0.4)])
def test_calibration_follows_the_twin(metric, target):
    import cupy

    inputs = [salekit.load_sample()[name][:, :2048] for name in "qkv"]
    found = []
    for placed in (inputs, [cupy.asarray(x) for x in inputs]):
        plan = arrays.make_plan(*placed, estimator="int8", dense_below=0)
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


def test_mask_dump_on_the_gpu():
    options = ("mask-dump", "--sample", "--estimator", "int8", "--json", "--backend")
    densities = [json.loads(run(*options, backend).stdout)["density"] for backend in ("numpy", "cuda")]
    assert np.abs(np.subtract(*densities)).max() <= 1e-3
