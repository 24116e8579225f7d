"""Thresholds from data: per head the largest tau that still meets a target, measured through the masks themselves.

The target is an error of the output, the attention mass kept, or a density to share among all heads. One estimation
pass stores each block's score (``block_scores``), which gives the mask at any tau; every tau that is tried is attended
to, all heads at once. What is reported in the end is measured through ``estimate``, as a call with these thresholds
runs it. The mass a row keeps is exp(lse over the mask - lse over everything).

With ``plan.skipped == "pool"`` errors are those of an output with pools of the skipped blocks. Recall, and with it what
a density is spent on, stays the mass of the selected blocks alone: what pools add to lse is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from .anchors import anchor_statistics, row_limits
from .attend import attend
from .block_mask import BlockMask
from .block_scores import block_scores, mask_from_scores, scores_plan
from .errors import ArgumentError
from .estimate import estimate
from .output_difference import output_sums
from .plans import Plan
from .quantize import quantize
from .thresholds import LOG2_RANGE, as_thresholds

METRICS = ("relative_error", "error", "recall")
ERRORS = METRICS[:2]
# Taus are sought in LOG2_RANGE. At 2^-20 next to everything is kept. tau is relative to the anchors' sum, which other
# keys may exceed by far.
STEPS = 13  # bisections: tau is known to a factor of 2^(32 / 8192)
GRID = 33  # taus that --density chooses from
SCORE_BYTES = 4 * 2**30  # of the block scores that are held at once; more heads than fit are taken in groups
STEP_BACK = 1 - 2.0**-12  # of a tau whose mask differs by rounding between the scores and a call, and fails by that


@dataclass(frozen=True)
class Measured:
    """What thresholds give, float64 [num_heads] each.

    density: set blocks over visible ones. relative_error: norm of the output's difference from dense attention over the
    norm of the dense output. error: sum of the absolute differences over seqlen_q (the paper's measure). recall: the
    mean over rows of the attention mass that the selected blocks hold, pools not counted.
    """

    density: np.ndarray
    relative_error: np.ndarray
    error: np.ndarray
    recall: np.ndarray


class HeadGroup:
    """Some query heads of a layer with their KV heads, quantised, and their dense attention."""

    def __init__(self, q: Any, k: Any, v: Any, dense: Any, dense_lse: Any, plan: Plan):
        self.q, self.k, self.v, self.plan = q, k, v, plan
        self._dense, self._dense_lse = dense, dense_lse
        self._codes = quantize(q, k, plan)
        self._statistics = anchor_statistics(q, k, self._codes.k_mean, plan)
        self._scores: Any = None

    def mask(self, thresholds: np.ndarray) -> BlockMask:
        """The mask of a call with these thresholds, [num_heads], on the backend of q."""
        values = as_thresholds(np.asarray(thresholds, np.float32), self.plan.num_heads, self.q)
        return estimate(self._codes, row_limits(*self._statistics, self._codes, values, self.plan), self.plan)

    def mask_by_scores(self, thresholds: np.ndarray) -> BlockMask:
        """The same without estimating again, save for scores that rounding puts on the other side of their limit."""
        plan = scores_plan(self.plan)
        if self._scores is None:
            codes = self._codes if plan is self.plan else quantize(self.q, self.k, plan)
            self._scores = block_scores(codes, *self._statistics, plan)
        return mask_from_scores(self._scores, thresholds, plan)

    def forget_scores(self) -> None:
        """Free their memory; they are computed again when they are asked for."""
        self._scores = None

    def measure(self, mask: BlockMask, wanted: tuple[str, ...] = ("density", *METRICS)) -> Measured:
        """What attention over this mask gives; what is not wanted may be NaN."""
        selected = self.plan.replace(skipped="drop")
        found = dict.fromkeys(("density", *METRICS), np.full(self.plan.num_heads, np.nan))
        if "density" in wanted:
            found["density"] = mask.density().mean(axis=0)
        if selected == self.plan:
            return Measured(**found | self._measure(mask, selected))
        for plan, names in ((selected, ("recall",)), (self.plan, ERRORS)):
            if set(wanted) & set(names):
                measured = self._measure(mask, plan)
                found |= {name: measured[name] for name in names}
        return Measured(**found)

    def _measure(self, mask: BlockMask, plan: Plan) -> dict[str, np.ndarray]:
        """METRICS of one attention; recall of all that the plan attends to."""
        out, lse = attend(self.q, self.k, self.v, mask, plan, return_lse=True)
        sums = output_sums(out, lse, self._dense, self._dense_lse, plan)
        rows = plan.batch * plan.seqlen_q
        with np.errstate(all="ignore"):
            relative = np.sqrt(sums.squares) / np.sqrt(sums.norm)
        return {
            "relative_error": np.where(sums.norm == 0, 0, relative),
            "error": sums.distance / rows,
            "recall": sums.kept / rows,
        }


class Layer:
    """One layer's q, k and v (bshd views, NumPy's or CuPy's), ready to be tried at any thresholds.

    Dense attention is computed once. Heads are taken in groups whose block scores fit in ``score_bytes``.
    """

    def __init__(self, q: Any, k: Any, v: Any, plan: Plan, score_bytes: int = SCORE_BYTES):
        if plan.attend != "exact":
            raise ArgumentError(f"attend: got {plan.attend!r}; calibration wants 'exact'")
        if plan.is_empty:
            raise ArgumentError(f"q, k: got shapes {q.shape} and {k.shape}; calibration wants rows and keys")
        if plan.is_dense:
            raise ArgumentError(f"dense_below: got {plan.dense_below}, so the call is dense; calibration wants less")
        self.q, self.k, self.v, self.plan = q, k, v, plan
        self._dense, self._dense_lse = attend(q, k, v, None, plan, return_lse=True)
        each = 4 * plan.batch * plan.num_q_blocks * plan.num_k_blocks * plan.group_size  # bytes of a KV head's scores
        self._kv_heads_each = max(1, min(plan.num_kv_heads, score_bytes // each))
        self._last: tuple[int, HeadGroup] | None = None

    @property
    def num_groups(self) -> int:
        return -(-self.plan.num_kv_heads // self._kv_heads_each)

    def groups(self) -> Iterator[tuple[slice, HeadGroup]]:
        """(query heads, group), one after another; a group is held until the next is asked for."""
        size = self.plan.group_size
        for index in range(self.num_groups):
            first = index * self._kv_heads_each
            kv = slice(first, min(first + self._kv_heads_each, self.plan.num_kv_heads))
            heads = slice(kv.start * size, kv.stop * size)
            if self._last is None or self._last[0] != index:
                if self._last:
                    self._last[1].forget_scores()  # whoever still holds the group
                plan = self.plan.replace(num_heads=heads.stop - heads.start, num_kv_heads=kv.stop - kv.start)
                group = HeadGroup(
                    self.q[:, :, heads], self.k[:, :, kv], self.v[:, :, kv], self._dense[:, :, heads],
                    self._dense_lse[:, heads], plan,
                )
                self._last = index, group
            yield heads, self._last[1]

    def measure(self, thresholds: np.ndarray) -> Measured:
        """What a call with these thresholds, [num_heads], gives."""
        thresholds = np.asarray(thresholds)
        return _joined(group.measure(group.mask(thresholds[heads])) for heads, group in self.groups())


def _joined(parts: Iterable[Measured]) -> Measured:
    parts = list(parts)
    return Measured(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Measured)))


def meets(measured: Measured, metric: str, target: float) -> np.ndarray:
    """bool [num_heads]. NaN meets nothing."""
    value = getattr(measured, metric)
    return value >= target if metric == "recall" else value <= target


def calibrate(
    layer: Layer, metric: str, target: float, tick: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, Measured]:
    """(thresholds float32 [num_heads], what they give): per head the largest tau found that meets the target.

    metric: of METRICS. Bisection over log tau, all heads of a group at once. A head that fails even at the smallest tau
    gets 0, which selects everything. tick: called once a bisection (STEPS for each of layer.num_groups). Raises
    ArgumentError.
    """
    if metric not in METRICS or not target >= 0:
        wants = f"one of {', '.join(METRICS)} and a number >= 0"
        raise ArgumentError(f"calibrate: got {metric!r}, {target!r}; wants {wants}")
    found = [_calibrate_group(group, metric, target, tick) for _, group in layer.groups()]
    return np.concatenate([tau for tau, _ in found]), _joined(measured for _, measured in found)


def _calibrate_group(group: HeadGroup, metric: str, target: float, tick) -> tuple[np.ndarray, Measured]:
    num_heads = group.plan.num_heads
    low, high = (np.full(num_heads, bound) for bound in LOG2_RANGE)
    good = np.zeros(num_heads, np.float32)  # what is known to meet the target
    for _ in range(STEPS):
        middle = (low + high) / 2
        tau = np.exp2(middle).astype(np.float32)
        met = meets(group.measure(group.mask_by_scores(tau), (metric,)), metric, target)
        good = np.where(met, tau, good)
        low, high = np.where(met, middle, low), np.where(met, high, middle)
        tick()
    measured = group.measure(group.mask(good))
    missed = ~meets(measured, metric, target) & (good > 0)
    if missed.any():
        good = np.where(missed, good * np.float32(STEP_BACK), good)
        measured = group.measure(group.mask(good))
    return good, measured


def calibrate_density(
    layer: Layer, density: float, tick: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, Measured]:
    """(thresholds float32 [num_heads], what they give): the budget spent where it keeps the most attention mass.

    density: the mean over heads that may be reached at most. Each of GRID taus is measured for all heads; then, from
    the sparsest on, the step of the head that gains the most mass for its blocks is taken for as long as the budget
    lasts (over the upper hull of a head's steps, so that a small gain does not hide a large one behind it). tick: GRID
    times for each of layer.num_groups.
    """
    if not 0 <= density <= 1:
        raise ArgumentError(f"density: got {density!r}; wants 0 to 1")
    taus = np.exp2(np.linspace(*LOG2_RANGE[::-1], GRID)).astype(np.float32)  # from the sparsest
    costs, gains = [], []
    for _, group in layer.groups():
        cost, gain = [], []
        for tau in taus:
            mask = group.mask_by_scores(tau)
            cost.append(mask.density().mean(axis=0))
            # The masks of falling taus hold each other: those of one density are the same.
            same = len(cost) > 1 and np.array_equal(cost[-1], cost[-2])
            gain.append(gain[-1] if same else group.measure(mask, ("recall",)).recall)
            tick()
        costs.append(cost)
        gains.append(gain)
    cost, gain = np.concatenate(costs, axis=1), np.nan_to_num(np.concatenate(gains, axis=1))
    place = _spend(cost, gain, density * layer.plan.num_heads)
    thresholds = taus[place]
    return thresholds, layer.measure(thresholds)


def _spend(cost: np.ndarray, gain: np.ndarray, budget: float) -> np.ndarray:
    """int [num_heads]: the row of cost and gain, [taus from the sparsest, num_heads], that each head gets."""
    num_heads = cost.shape[1]
    place, spent = np.zeros(num_heads, int), cost[0].sum()
    steps = sorted(
        ((slope, -order, head, end) for head in range(num_heads)
         for order, (slope, end) in enumerate(_hull(cost[:, head], gain[:, head]))),
        reverse=True,
    )
    full = set()
    for _, _, head, end in steps:
        price = cost[end, head] - cost[place[head], head]
        if head in full or spent + price > budget + 1e-12:
            full.add(head)  # its later steps build on this one
            continue
        place[head], spent = end, spent + price
    return place


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
