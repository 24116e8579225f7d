"""Thresholds from data: per head the largest tau that still meets a target, measured through the masks themselves.

The target is an error of the output, the attention mass kept, or a density to share among all heads. Each tau that is
tried is estimated and attended to as a call would do it, all heads at once, so what is reported is what a call with
these thresholds gives. The mass a row keeps is exp(lse over the mask - lse over everything).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np

from . import arrays
from .anchors import anchor_statistics, row_limits
from .attend import attend
from .block_mask import BlockMask
from .errors import ArgumentError
from .estimate import estimate
from .plans import Plan
from .quantize import quantize
from .thresholds import as_thresholds

METRICS = ("relative_error", "error", "recall")
# Of tau. At 2^-20 next to everything is kept. tau is relative to the anchors' sum, which other keys may exceed by far.
LOG2_RANGE = (-20.0, 12.0)
STEPS = 13  # bisections: tau is known to a factor of 2^(32 / 8192)
GRID = 33  # taus that --density chooses from


@dataclass(frozen=True)
class Measured:
    """What thresholds give, float64 [num_heads] each.

    density: set blocks over visible ones. relative_error: norm of the output's difference from dense attention over the
    norm of the dense output. error: sum of the absolute differences over seqlen_q (the paper's measure). recall: the
    mean over rows of the attention mass that the selected blocks hold.
    """

    density: np.ndarray
    relative_error: np.ndarray
    error: np.ndarray
    recall: np.ndarray


class Layer:
    """One layer's q, k and v (bshd views, NumPy's or CuPy's), ready to be tried at any thresholds."""

    def __init__(self, q: Any, k: Any, v: Any, plan: Plan):
        if plan.attend != "exact" or plan.is_dense or plan.is_empty:
            raise ArgumentError("calibration wants exact attention and more keys than dense_below")
        self.q, self.k, self.v, self.plan = q, k, v, plan
        out, lse = attend(q, k, v, None, plan, return_lse=True)
        self._dense, self._dense_lse = _host(out), _host(lse)
        self._codes = quantize(q, k, plan)
        self._statistics = anchor_statistics(q, k, self._codes.k_mean, plan)

    def mask(self, thresholds: np.ndarray) -> BlockMask:
        """thresholds: [num_heads]. On the backend of q."""
        values = as_thresholds(np.asarray(thresholds, np.float32), self.plan.num_heads, self.q)
        return estimate(self._codes, row_limits(*self._statistics, self._codes, values, self.plan), self.plan)

    def measure(self, thresholds: np.ndarray) -> Measured:
        """thresholds: [num_heads]."""
        mask = self.mask(thresholds)
        out, lse = attend(self.q, self.k, self.v, mask, self.plan, return_lse=True)
        difference = _host(out) - self._dense
        norm = np.sqrt(np.square(self._dense).sum(axis=(0, 1, 3)))
        with np.errstate(all="ignore"):
            kept = np.exp(_host(lse) - self._dense_lse)
            relative = np.sqrt(np.square(difference).sum(axis=(0, 1, 3))) / norm
        kept = np.where(np.isneginf(self._dense_lse), 1, np.minimum(kept, 1))  # rows that see no key lack nothing
        return Measured(
            density=mask.density().mean(axis=0),
            relative_error=np.where(norm == 0, 0, relative),
            error=np.abs(difference).sum(axis=(0, 1, 3)) / (self.plan.batch * self.plan.seqlen_q),
            recall=kept.mean(axis=(0, 2)),
        )


def _host(x: Any) -> np.ndarray:
    return (x.get() if arrays.is_cuda(x) else x).astype(np.float64)


def meets(measured: Measured, metric: str, target: float) -> np.ndarray:
    """bool [num_heads]. NaN meets nothing."""
    value = getattr(measured, metric)
    return value >= target if metric == "recall" else value <= target


def calibrate(
    layer: Layer, metric: str, target: float, tick: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, Measured]:
    """(thresholds float32 [num_heads], what they give): per head the largest tau found that meets the target.

    metric: of METRICS. Bisection over log tau, all heads at once. A head that fails even at the smallest tau gets 0,
    which selects everything. tick: called once a bisection (STEPS in all). Raises ArgumentError.
    """
    if metric not in METRICS or not target >= 0:
        wants = f"one of {', '.join(METRICS)} and a number >= 0"
        raise ArgumentError(f"calibrate: got {metric!r}, {target!r}; wants {wants}")
    num_heads = layer.plan.num_heads
    low, high = (np.full(num_heads, bound) for bound in LOG2_RANGE)
    good = np.zeros(num_heads, np.float32)  # what is known to meet the target
    for _ in range(STEPS):
        middle = (low + high) / 2
        tau = np.exp2(middle).astype(np.float32)
        met = meets(layer.measure(tau), metric, target)
        good = np.where(met, tau, good)
        low, high = np.where(met, middle, low), np.where(met, high, middle)
        tick()
    return good, layer.measure(good)


def calibrate_density(
    layer: Layer, density: float, tick: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, Measured]:
    """(thresholds float32 [num_heads], what they give): the budget spent where it keeps the most attention mass.

    density: the mean over heads that may be reached at most. Each of GRID taus is measured for all heads; then, from
    the sparsest on, the step of the head that gains the most mass for its blocks is taken for as long as the budget
    lasts (over the upper hull of a head's steps, so that a small gain does not hide a large one behind it). tick: GRID
    times.
    """
    if not 0 <= density <= 1:
        raise ArgumentError(f"density: got {density!r}; wants 0 to 1")
    num_heads = layer.plan.num_heads
    taus = np.exp2(np.linspace(*LOG2_RANGE[::-1], GRID)).astype(np.float32)  # from the sparsest
    measured = []
    for tau in taus:
        measured.append(layer.measure(np.full(num_heads, tau)))
        tick()
    cost = np.stack([m.density for m in measured])
    gain = np.stack([np.nan_to_num(m.recall) for m in measured])
    place, spent = np.zeros(num_heads, int), cost[0].sum()
    steps = sorted(
        ((slope, -order, head, end) for head in range(num_heads)
         for order, (slope, end) in enumerate(_hull(cost[:, head], gain[:, head]))),
        reverse=True,
    )
    full = set()
    for _, _, head, end in steps:
        price = cost[end, head] - cost[place[head], head]
        if head in full or spent + price > density * num_heads + 1e-12:
            full.add(head)  # its later steps build on this one
            continue
        place[head], spent = end, spent + price
    thresholds = taus[place]
    return thresholds, layer.measure(thresholds)


def _hull(cost: np.ndarray, gain: np.ndarray) -> list[tuple[float, int]]:
    """(gain over cost, index) of the steps along the upper hull of points of rising cost, from the first on."""
    steps, at = [], 0
    while True:
        ahead = np.flatnonzero((cost > cost[at]) & (gain > gain[at]))
        if ahead.size == 0:
            return steps
        slopes = (gain[ahead] - gain[at]) / (cost[ahead] - cost[at])
        best = ahead[np.flatnonzero(slopes == slopes.max())[-1]]
        steps.append((float(slopes.max()), int(best)))
        at = best
