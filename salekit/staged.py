"""A call of ``sparse_attention`` taken apart, so that each of its stages can be timed alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable

from .anchors import anchor_statistics, row_limits
from .attend import attend
from .block_mask import BlockMask
from .codes import Quantized
from .estimate import estimate
from .plans import Plan
from .programs import stage
from .quantize import quantize


@dataclass(frozen=True)
class StagedCall:
    """q, k, v: checked bshd views; thresholds: what ``as_thresholds`` returned; plan: of ``make_plan``.

    mask: attended through instead of the estimated one, which is computed all the same.
    """

    q: Any
    k: Any
    v: Any
    thresholds: Any
    plan: Plan
    mask: BlockMask | None = None

    @cached_property
    def codes(self) -> Quantized:
        return self.quantize()

    @cached_property
    def limits(self) -> Any:
        return self.anchors()

    @cached_property
    def estimated(self) -> BlockMask:
        return self.estimate()

    def quantize(self) -> Quantized:
        with stage("quantize"):
            return quantize(self.q, self.k, self.plan)

    def anchors(self) -> Any:
        """Anchor statistics and the rows' limits, from codes that are there."""
        return self._limits_of(self.codes)

    def estimate(self) -> BlockMask:
        """From codes and limits that are there."""
        return self._mask_of(self.codes, self.limits)

    def attend(self) -> Any:
        """Through the given mask, or the estimated one that is there."""
        return self._output_of(self.mask or self.estimated)

    def attend_selected(self) -> Any:
        """The same without pools of what is skipped."""
        return self._output_of(self.mask or self.estimated, self.plan.replace(skipped="drop"))

    def before_attention(self) -> BlockMask:
        """Everything up to the mask, one stage after another."""
        codes = self.quantize()
        return self._mask_of(codes, self._limits_of(codes))

    def total(self) -> Any:
        """Every stage, one after another; attends through the given mask where there is one."""
        estimated = self.before_attention()
        return self._output_of(self.mask or estimated)

    def timed(self) -> dict[str, Callable[[], Any]]:
        """The stages by the names under which they are reported."""
        return {
            "quantize": self.quantize,
            "anchors": self.anchors,
            "estimate": self.estimate,
            "before-attention": self.before_attention,
            "attend": self.attend,
            "total": self.total,
        }

    def _limits_of(self, codes: Quantized) -> Any:
        with stage("anchors"):
            m, l, *shift = anchor_statistics(self.q, self.k, codes.k_mean, self.plan)
            return row_limits(m, l, codes, self.thresholds, self.plan, *shift)

    def _mask_of(self, codes: Quantized, limits: Any) -> BlockMask:
        with stage("estimate"):
            return estimate(codes, limits, self.plan)

    def _output_of(self, mask: BlockMask, plan: Plan | None = None) -> Any:
        with stage("attend"):
            return attend(self.q, self.k, self.v, mask, plan or self.plan)[0]
