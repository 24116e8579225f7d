"""How far an attention's output is from the dense one, and how much of the attention mass it kept, per head."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import arrays, jit
from .plans import Plan, ceil_div

_THREADS = 256
_ROWS = 256  # COMPARE_ROWS of compare_outputs.cu


class OutputSums(NamedTuple):
    """float64 [num_heads] each, over batches, rows and channels.

    squares: of the difference; distance: its absolute values; norm: squares of the dense output; kept: over rows, the
    attention mass that was kept, exp(lse - dense_lse), at most 1 (1 for a row that sees no key).
    """

    squares: np.ndarray
    distance: np.ndarray
    norm: np.ndarray
    kept: np.ndarray


def output_sums(out: Any, lse: Any, dense: Any, dense_lse: Any, plan: Plan) -> OutputSums:
    """Compare out with dense, [batch, seqlen_q, num_heads, head_dim] bshd views, and their lse, float32 [batch,
    num_heads, seqlen_q] with contiguous heads. On the GPU nothing but the sums comes to the host.
    """
    if not arrays.is_cuda(out):
        return _on_host(out, lse, dense, dense_lse, plan)
    chunks = ceil_div(plan.seqlen_q, _ROWS)
    sums = arrays.empty((plan.batch, plan.num_heads, chunks, 4), np.float64)
    jit.get_kernel(_spec(plan))(
        (chunks, plan.num_heads, plan.batch), (_THREADS,),
        (
            arrays.tensor_view(out), arrays.tensor_view(dense), lse, dense_lse,
            *(np.int64(x.strides[0] // x.itemsize) for x in (lse, dense_lse)), sums, np.int32(plan.seqlen_q),
        ),
    )
    return OutputSums(*np.moveaxis(sums.get().sum(axis=(0, 2)), -1, 0))


def _on_host(out, lse, dense, dense_lse, plan: Plan) -> OutputSums:
    sums = np.zeros((4, plan.num_heads))
    with np.errstate(all="ignore"):
        for head in range(plan.num_heads):  # one at a time: float64 copies of all are large
            theirs = dense[:, :, head].astype(np.float64)
            difference = out[:, :, head].astype(np.float64) - theirs
            of_all = dense_lse[:, head].astype(np.float64)
            kept = np.where(np.isneginf(of_all), 1, np.minimum(np.exp(lse[:, head] - of_all), 1))
            sums[:, head] = np.square(difference).sum(), np.abs(difference).sum(), np.square(theirs).sum(), kept.sum()
    return OutputSums(*sums)


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernel that :func:`output_sums` launches for this plan."""
    return [_spec(plan)]


def _spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("compare_outputs", (str(plan.head_dim), plan.element))
