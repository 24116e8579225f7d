"""Selectors at equal density: how much attention mass their masks keep and how far the output is off, per head."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Callable

import numpy as np

from .calibration import HeadGroup, Layer, Measured
from .errors import ArgumentError
from .plans import Plan
from .selectors import Selector, levels_of, mask_at

# A family whose levels tie may not have a mask of just the wanted density: one that holds up to this part more blocks
# is taken as it is, else the masks on both sides are measured and what they give is interpolated.
TIE_SLACK = 0.005


@dataclass(frozen=True)
class Point:
    """What a selector gives at a wanted density, float64 [num_heads] each; NaN where it has no such mask.

    density is what was measured (by interpolation the wanted one); knob: the selector's setting, its densest mask's.
    """

    wanted: float
    density: np.ndarray
    recall: np.ndarray
    relative_error: np.ndarray
    error: np.ndarray
    knob: np.ndarray


class Comparison:
    """One layer's q, k and v (bshd views, NumPy's or CuPy's), to measure selectors on. Dense attention runs once.

    shared: one knob for all heads, with the wanted density as their mean; else each head has the wanted density.
    anchors: SALE's anchors are always kept by every selector. With ``plan.skipped == "pool"`` every selector's errors
    are those of an output with pools of what it skips; recall is of the selected blocks alone. Raises ArgumentError.
    """

    def __init__(self, q: Any, k: Any, v: Any, plan: Plan, shared: bool = False, anchors: bool = False):
        if not plan.causal:
            raise ArgumentError("selectors are compared on causal attention")
        self.q, self.k, self.plan, self.shared, self.anchors = q, k, plan, shared, anchors
        ((_, self._group),) = Layer(q, k, v, plan, score_bytes=2**62).groups()

    @property
    def group(self) -> HeadGroup:
        """What measures a mask."""
        return self._group

    def points(
        self, selector: Selector, densities: list[float], tick: Callable[[], None] = lambda: None
    ) -> tuple[list[Point], np.ndarray]:
        """(a Point for each density, the sparsest density of each head). tick: once a density and once before."""
        levels = levels_of(selector, self.q, self.k, self.plan, self.anchors)
        order = Orders(levels, self.plan, self.shared)
        tick()
        points = []
        for density in densities:
            points.append(self._point(selector, levels, order, density))
            tick()
        return points, order.sparsest

    def _point(self, selector: Selector, levels: Any, order: Orders, wanted: float) -> Point:
        low, high, weight = order.limits(wanted)
        at_high = self._group.measure(mask_at(levels, high, self.plan))
        if (weight < 1).any():
            at_low = self._group.measure(mask_at(levels, low, self.plan))
            at_high = _mix(at_low, at_high, weight)
        knob = np.array([selector.knob_of(float(x)) if np.isfinite(x) else np.nan for x in high])
        missing = np.isnan(weight)
        values = {field.name: np.where(missing, np.nan, getattr(at_high, field.name)) for field in fields(Measured)}
        return Point(wanted, knob=np.where(missing, np.nan, knob), **values)


def _mix(low: Measured, high: Measured, weight: np.ndarray) -> Measured:
    """(1 - weight) * low + weight * high; exactly high where weight is 1."""
    parts = {}
    for field in fields(Measured):
        a, b = getattr(low, field.name), getattr(high, field.name)
        parts[field.name] = np.where(weight == 1, b, (1 - weight) * a + weight * b)
    return Measured(**parts)


class Orders:
    """Levels in order, on the host, to find the limit that gives a density."""

    def __init__(self, levels: Any, plan: Plan, shared: bool):
        host = levels if isinstance(levels, np.ndarray) else levels.get()
        per_head = np.moveaxis(host, 1, 0).reshape(plan.num_heads, -1)
        self._visible = plan.batch * int(plan.visible_blocks.sum())  # of a head
        self._num_heads, self._shared = plan.num_heads, shared
        groups = [per_head.ravel()] if shared else list(per_head)
        self._sorted = [np.sort(group[group < np.inf]) for group in groups]
        always = np.isneginf(per_head).sum(axis=1)
        self.sparsest = always / max(1, self._visible)

    def limits(self, density: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(low, high, weight), float64 [num_heads]: the masks at both limits, mixed, have the density.

        weight 1: the mask at high has it alone. NaN: the family has no mask this sparse, or this dense.
        """
        total = self._visible * (self._num_heads if self._shared else 1)
        found = [_limits(values, round(density * total)) for values in self._sorted]
        return tuple(np.broadcast_to(np.array(x, float), (self._num_heads,)) for x in zip(*found))


def _limits(values: np.ndarray, count: int) -> tuple[float, float, float]:
    """The same for sorted levels and a number of blocks."""
    if not 1 <= count <= len(values):
        return -np.inf, -np.inf, np.nan
    high = values[count - 1]
    upper = int(np.searchsorted(values, high, side="right"))
    lower = int(np.searchsorted(values, high, side="left"))
    if upper <= count * (1 + TIE_SLACK):
        return high, high, 1.0
    if np.isneginf(high):  # what is always kept is more than that
        return high, high, np.nan
    if lower == 0:
        return -np.inf, high, np.nan
    return values[lower - 1], high, (count - lower) / (upper - lower)
