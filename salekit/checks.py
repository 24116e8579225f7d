"""Verdicts: comparisons whose bounds are derived from the roundings in them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

U32 = 2.0**-24  # unit roundoff of float32
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
# A few rounding steps of exp, log and of the products around them (2 ulp each in the hardware's ex2 and lg2).
FEW = 16 * U32


@dataclass(frozen=True)
class Check:
    """One verdict. error and bound are those of the element that came closest to (or passed) its own bound."""

    stage: str
    compared: str
    error: float
    bound: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return {name: json_number(x) for name, x in asdict(self).items()}


def json_number(x: Any) -> Any:
    """JSON has no NaN or infinity: None."""
    return None if isinstance(x, float) and not abs(x) < float("inf") else x


def within(stage: str, compared: str, got: Any, want: Any, bound: Any) -> Check:
    """|got - want| <= bound, element by element; NaN and infinity must sit in the same places."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    # Where the inputs are not finite no bound is either: nothing but equality passes.
    bound = np.broadcast_to(np.nan_to_num(np.asarray(bound, np.float64), nan=0.0, posinf=0.0), want.shape)
    if got.shape != want.shape:
        return Check(stage, f"{compared} (shapes {got.shape} and {want.shape})", float("nan"), 0.0, False)
    if want.size == 0:
        return Check(stage, compared, 0.0, 0.0, True)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(all="ignore"):
        error = np.where(same, 0.0, np.abs(got - want))
        ratio = np.where(error == 0, 0.0, np.where(np.isnan(error), np.inf, error / np.maximum(bound, 1e-300)))
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    if ratio[worst] == 0:  # all equal: show the least bound
        return Check(stage, compared, 0.0, float(bound.min()), True)
    return Check(stage, compared, float(error[worst]), float(bound[worst]), bool((error <= bound).all()))


def equal(stage: str, compared: str, got: Any, want: Any) -> Check:
    """Every element equal; the error is how many are not."""
    got, want = np.asarray(got), np.asarray(want)
    different = float(np.count_nonzero(got != want)) if got.shape == want.shape else float("nan")
    return Check(stage, compared, different, 0.0, different <= 0)


def share(stage: str, compared: str, different: Any, bound: float) -> Check:
    """The share of true elements is at most ``bound``."""
    error = float(np.mean(different)) if np.size(different) else 0.0
    return Check(stage, compared, error, bound, error <= bound)
