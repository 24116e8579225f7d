"""Every kernel instance that salekit may launch on an architecture, by walking over Plans."""

from __future__ import annotations

from itertools import product

from .anchors import kernel_specs as anchor_specs
from .attend import kernel_specs as attend_specs
from .block_scores import kernel_specs as scores_specs
from .ceilings import kernel_specs as ceilings_specs
from .estimate import kernel_specs as estimate_specs
from .jit import KernelSpec
from .output_difference import kernel_specs as difference_specs
from .pipeline import kernel_specs as pipeline_specs
from .plans import BLOCKS, DTYPES, ESTIMATORS, HEAD_DIMS, LOW_BIT_ARCHS, Plan
from .quantize import kernel_specs as quantize_specs
from .workloads import kernel_specs as workload_specs

STAGES = {
    "quantize": quantize_specs,
    "anchors": anchor_specs,
    "estimate": estimate_specs,
    "attend": attend_specs,
    "pipeline": pipeline_specs,
}
_FEATURES = ({"softcap": 30.0, "window_left": 100}, {"softcap": 30.0}, {"window_left": 100})
_LONG = 2**20  # tokens: the keys are attended in segments
TOOLS = {  # outside of a call
    "scores": scores_specs,
    "difference": difference_specs,
    "workload": workload_specs,
    "ceilings": ceilings_specs,
}


def all_specs(arch: str) -> list[tuple[str, KernelSpec]]:
    """(stage, spec) of every kernel for this architecture, each once.

    Of softcap, windows and sink logits in float16: none, sink logits, and the other two with and without them.
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
        features = [{}, *(_FEATURES if dtype == "bfloat16" else _FEATURES[:1])]
        for changes in features if estimator != "int8-sp24" else []:
            changed = plan.replace(**changes)
            for has_sinks in (False, True):
                for stage, specs in (("anchors", anchor_specs), ("attend", attend_specs)):
                    for spec in specs(changed, has_sinks):
                        found.setdefault(spec, stage)
                if not changed.has_window:
                    for spec in attend_specs(changed.replace(seqlen_q=_LONG, seqlen_k=_LONG), has_sinks):
                        found.setdefault(spec, "attend")
            if changed.has_window:
                for spec in estimate_specs(changed):
                    found.setdefault(spec, "estimate")
        if arch in LOW_BIT_ARCHS:
            for spec in attend_specs(plan.replace(attend="int8-fp8")):
                found.setdefault(spec, "attend")
        for stage, specs in TOOLS.items():
            for spec in specs(plan):
                found.setdefault(spec, stage)
    return [(stage, spec) for spec, stage in found.items()]


def call_specs(plan: Plan) -> list[KernelSpec]:
    """What one ``sparse_attention`` call of this plan launches."""
    return [spec for specs in STAGES.values() for spec in specs(plan)]
