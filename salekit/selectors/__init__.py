"""Ways to choose key blocks, side by side: SALE's estimators and the field's, as families of nested masks.

A selector gives every block of the grid a *level*, float32: at a knob it keeps the blocks whose level is small enough,
so that the levels hold its masks at every setting. -inf is always kept, +inf (what nothing sees) never. ``SELECTORS``
lists them with their source, what they were checked against, and their cost. Causal attention alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

from ..errors import ArgumentError
from ..plans import ESTIMATORS, QUERY_STRIDES, Plan
from . import costs, field, own
from .costs import Product
from .grid import anchor_blocks, finish, mask_at, module_of

__all__ = ["SELECTORS", "Product", "Selector", "levels_of", "mask_at"]

UNVERIFIED = "unverified"


@dataclass(frozen=True)
class Selector:
    """One way to choose blocks.

    levels(q, k, plan): float32 [batch, num_heads, num_q_blocks, num_k_blocks] from bshd views, NumPy's or CuPy's.
    cost(plan): multiply-adds before the attention (``costs.Product``). knob: its own parameter's name; knob_of(level)
    the setting from which a block of that level is kept. checked_against: the authors' code that it was read next to
    (repository, commit, file), or ``UNVERIFIED``. saves_scores: False where q.k is multiplied for skipped blocks, too.
    """

    name: str
    levels: Callable[[Any, Any, Plan], Any]
    cost: Callable[[Plan], list[Product]]
    knob: str
    source: str
    checked_against: str
    knob_of: Callable[[float], float] = float
    saves_scores: bool = True

    def work(self, plan: Plan, density: float) -> float:
        """Multiply-adds of choosing, attending and, where the plan has them, pools over those of dense attention, each
        weighed by bits / 16."""
        attended = density if self.saves_scores else density / 2  # the cost holds the whole of q.k
        pools = costs.pools(plan) if plan.skipped == "pool" else []
        return costs.equivalent([*self.cost(plan), *pools]) / 2 + attended


def levels_of(selector: Selector, q: Any, k: Any, plan: Plan, anchors: bool = False) -> Any:
    """The selector's levels; ``anchors`` has SALE's anchor blocks always kept, whatever the method is.

    q: [batch, seqlen_q, num_heads, head_dim], k: [batch, seqlen_k, num_kv_heads, head_dim], bshd views. ArgumentError
    for a plan that is not causal or has no row or no key.
    """
    if not plan.causal or plan.is_empty:
        raise ArgumentError("selectors want causal attention with at least one row and one key")
    levels = selector.levels(q, k, plan)
    if not anchors:
        return levels
    also = anchor_blocks(plan)
    return module_of(levels).stack([finish(of_batch, plan, also) for of_batch in levels])


def _exp_minus(level: float) -> float:
    return math.exp(min(700.0, -level))


def _sale(name: str, stride: int) -> Selector:
    return Selector(
        name if stride == 1 else f"{name}/{stride}",
        lambda q, k, plan: own.estimator_levels(q, k, plan, name, stride),
        lambda plan: costs.estimator(plan, name, stride),
        "tau",
        "Ji et al., SALE, arXiv 2505.24179" + {"int4": "", "int8": "; codes by salekit"}.get(name, "; by salekit"),
        "salekit's kernels and twin, which the tests compare bit by bit",
        _exp_minus,
    )


_XATTENTION = "mit-han-lab/x-attention e379887, xattn/src/Xattention.py and xattn/src/utils.py"
_MINFERENCE = "microsoft/MInference fb56c91, minference/modules/minference_forward.py and csrc/vertical_slash_index.cu"
_SPARGE = "thu-ml/SpargeAttn bfd980b, spas_sage_attn/utils.py and spas_sage_attn/core.py"


def _minference(name: str, verticals: int, slashes: int) -> Selector:
    return Selector(
        name,
        lambda q, k, plan: field.minference_levels(q, k, plan, verticals, slashes),
        costs.minference,
        f"r of {verticals}:{slashes}",
        f"Jiang et al., MInference, arXiv 2407.02490, vertical-slash, {verticals} keys to {slashes} distances",
        _MINFERENCE,
    )


def _xattention(stride: int) -> Selector:
    return Selector(
        f"xattention-{stride}",
        lambda q, k, plan: field.xattention_levels(q, k, plan, stride),
        partial(costs.xattention, stride=stride),
        "threshold",
        f"Xu et al., XAttention, arXiv 2503.16428, stride {stride}",
        _XATTENTION,
    )


_ALL = (
    Selector(
        "oracle-mass",
        own.mass_levels,
        costs.whole,
        "mass",
        "the blocks with the most attention mass",
        "an upper bound by definition",
        lambda level: -level,
    ),
    Selector(
        "exact",
        own.exact_levels,
        costs.whole,
        "tau",
        "SALE's rule on exact scores",
        "the rule of SALE, in the tests pair by pair",
        _exp_minus,
    ),
    *(_sale(name, stride) for name in ESTIMATORS for stride in QUERY_STRIDES),
    Selector(
        "sink-local",
        own.window_levels,
        costs.none,
        "window",
        "Xiao et al., StreamingLLM, arXiv 2309.17453: first 32 keys and a window",
        UNVERIFIED,
    ),
    _minference("minference", 1000, 6096),
    _minference("minference-v", 3500, 100),
    Selector(
        "flexprefill",
        field.flexprefill_levels,
        costs.flexprefill,
        "gamma",
        "Lai et al., FlexPrefill, arXiv 2502.20766, tau 0.1",
        "ByteDance-Seed/FlexPrefill a24b27b, flex_prefill/ops/flex_prefill_attention.py",
    ),
    _xattention(8),
    _xattention(16),
    Selector(
        "sparge",
        lambda q, k, plan: field.sparge_levels(q, k, plan, 0.6, False),
        costs.sparge,
        "cdf",
        "Zhang et al., SpargeAttn, arXiv 2502.18137, first stage, similarity 0.6",
        _SPARGE,
    ),
    Selector(
        "sparge-cdf",
        lambda q, k, plan: field.sparge_levels(q, k, plan, -0.1, False),
        costs.sparge,
        "cdf",
        "the same with similarity -0.1: every block is pooled",
        _SPARGE,
    ),
    Selector(
        "sparge-topk",
        lambda q, k, plan: field.sparge_levels(q, k, plan, -0.1, True),
        costs.sparge,
        "topk",
        "SpargeAttn's recommended call: a share of the key blocks, similarity -0.1",
        _SPARGE,
    ),
    Selector(
        "quest",
        field.quest_levels,
        costs.quest,
        "pages",
        "Tang et al., Quest, arXiv 2406.10774, by row",
        "mit-han-lab/Quest 01c1623, evaluation/quest_attention.py",
    ),
    Selector(
        "blasst",
        field.blasst_levels,
        costs.whole,
        "lambda",
        "Yuan et al., BLASST, arXiv 2512.12087: running maximum, keys from the first on",
        "NVIDIA/Model-Optimizer 015f525, modelopt/torch/kernels/triton_fa.py, skip-softmax",
        _exp_minus,
        saves_scores=False,
    ),
)
SELECTORS: dict[str, Selector] = {selector.name: selector for selector in _ALL}
