"""Every kernel instance that salekit may launch on an architecture, by walking over Plans."""

from __future__ import annotations

from itertools import product

from .anchors import kernel_specs as anchor_specs
from .attend import kernel_specs as attend_specs
from .block_scores import kernel_specs as scores_specs
from .ceilings import kernel_specs as ceilings_specs
from .estimate import kernel_specs as estimate_specs
from .jit import KernelSpec
from .key_statistics import kernel_specs as statistics_specs
from .merge import kernel_specs as merge_specs
from .output_difference import kernel_specs as difference_specs
from .pipeline import kernel_specs as pipeline_specs
from .plans import (
    BLOCKS,
    DTYPES,
    ESTIMATORS,
    HEAD_DIMS,
    LOW_BIT_ARCHS,
    LOW_BIT_HEAD_DIMS,
    POOLED_HEAD_DIMS,
    WGMMA_HEAD_DIMS,
    Plan,
)
from .quantize import kernel_specs as quantize_specs
from .sequences import kernel_specs as sequences_specs
from .skipped_mass import kernel_specs as pool_specs
from .workloads import kernel_specs as workload_specs

STAGES = {
    "quantize": quantize_specs,
    "anchors": anchor_specs,
    "estimate": estimate_specs,
    "attend": attend_specs,
    "pipeline": pipeline_specs,
}
# Changes of a plan, and whether its calls have sink logits.
_ALL_FEATURES = ({"softcap": 30.0, "window_left": 100}, True)
_FEATURES = (({"softcap": 30.0}, False), ({"window_left": 100}, False), ({}, True), _ALL_FEATURES)
_LONG = 2**20  # tokens: the keys are attended in segments
SERVING = {"sequences": sequences_specs, "merge": merge_specs, "statistics": statistics_specs}
TOOLS = {  # outside of a call
    "scores": scores_specs,
    "difference": difference_specs,
    "workload": workload_specs,
    "ceilings": ceilings_specs,
}


def all_specs(arch: str, with_variants: bool = True) -> list[tuple[str, KernelSpec]]:
    """(stage, spec) of every kernel for this architecture, each once.

    with_variants: those with lengths, softcap, windows and sink logits, too.

    Of kernels with softcap, windows and sink logits: in bfloat16 each of the three and all of them, with head_dim 96,
    192 and 256 all of them, and each alone of attend_sm90; of those with lengths, in bfloat16, none of the three and
    all of them. Other combinations compile as well.
    """
    found: dict[KernelSpec, str] = {}
    for dtype, head_dim, (block_q, block_k), estimator, kv_heads in product(
        DTYPES, HEAD_DIMS, BLOCKS, ESTIMATORS, (2, 4)
    ):
        plan = Plan(
            1,
            4096,
            4096,
            4,
            kv_heads,
            head_dim,
            dtype,
            head_dim**-0.5,
            estimator=estimator,
            block_q=block_q,
            block_k=block_k,
            arch=arch,
        )
        for stage, specs in STAGES.items():
            for spec in specs(plan):
                found.setdefault(spec, stage)
        for spec in attend_specs(plan.replace(seqlen_q=_LONG, seqlen_k=_LONG)):
            found.setdefault(spec, "attend")
        has_features = with_variants and dtype == "bfloat16" and estimator != "int8-sp24"
        for changes, has_sinks in _FEATURES if has_features else ():
            changed = plan.replace(**changes)
            if head_dim not in WGMMA_HEAD_DIMS and (changes, has_sinks) != _ALL_FEATURES:
                for spec in attend_specs(changed, has_sinks):
                    if spec.source == "attend_sm90":
                        found.setdefault(spec, "attend")
                continue
            for spec in anchor_specs(changed, has_sinks):
                found.setdefault(spec, "anchors")
            for size in (plan.seqlen_k, _LONG):
                for spec in attend_specs(changed.replace(seqlen_q=size, seqlen_k=size), has_sinks):
                    found.setdefault(spec, "attend")
            if changed.has_window:
                for spec in estimate_specs(changed):
                    found.setdefault(spec, "estimate")
                for spec in pipeline_specs(changed):
                    found.setdefault(spec, "pipeline")
        if arch in LOW_BIT_ARCHS and head_dim in LOW_BIT_HEAD_DIMS:
            for spec in attend_specs(plan.replace(attend="int8-fp8")):
                found.setdefault(spec, "attend")
        if head_dim in POOLED_HEAD_DIMS:
            for spec in pool_specs(plan):
                found.setdefault(spec, "pool")
        for stage, specs in (SERVING | TOOLS).items():
            for spec in specs(plan):
                found.setdefault(spec, stage)
        if not with_variants or dtype != "bfloat16":
            continue
        packed = plan.replace(has_lengths=True)
        for stage, specs in STAGES.items():
            for spec in specs(packed):
                found.setdefault(spec, stage)
        for spec in attend_specs(packed.replace(seqlen_q=_LONG, seqlen_k=_LONG)):
            found.setdefault(spec, "attend")
        changes, has_sinks = _ALL_FEATURES
        changed = packed.replace(**changes)
        for spec in anchor_specs(changed, has_sinks):
            found.setdefault(spec, "anchors")
        for spec in estimate_specs(changed):
            found.setdefault(spec, "estimate")
        for spec in attend_specs(changed, has_sinks):
            found.setdefault(spec, "attend")
        if arch in LOW_BIT_ARCHS and head_dim in LOW_BIT_HEAD_DIMS:
            for spec in attend_specs(packed.replace(attend="int8-fp8")):
                found.setdefault(spec, "attend")
    return [(stage, spec) for spec, stage in found.items()]


def call_specs(plan: Plan) -> list[KernelSpec]:
    """What one ``sparse_attention`` call of this plan launches."""
    pools = pool_specs(plan) if plan.skipped == "pool" else []
    return [spec for specs in STAGES.values() for spec in specs(plan)] + pools
