"""Anchors: each row's softmax statistics over the keys that are always kept, and the limit its scores have to exceed
(DESIGN section 3, steps 2 and 4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit, reference
from .codes import Quantized
from .plans import Plan, ceil_div

_NULL = np.uint64(0)  # a pointer that a kernel does not read


def anchor_statistics(q: Any, k: Any, k_mean: Any, plan: Plan) -> tuple[Any, Any]:
    """Maximum of s and sum of exp(s - m) over a row's visible anchor keys, with s of the smoothed key k - k_mean.

    q: [batch, seqlen_q, num_heads, head_dim]; k: [batch, seqlen_k, num_kv_heads, head_dim]; bshd views, NumPy's (the
        twin runs) or CuPy's (16-byte aligned rows). k_mean: float32 [batch, num_kv_heads, head_dim].

    Returns (m, l), float32 [batch, num_heads, seqlen_q]; m in units of the scaled score. A row without a visible anchor has
    m = -inf, l = 0; a NaN or inf in the row or its KV head leaves m or l NaN or inf. Nothing is checked here.
    """
    if not arrays.is_cuda(q):
        return reference.anchor_statistics(q, k, k_mean, plan)
    cupy = arrays.import_cupy()
    m = cupy.empty((plan.batch, plan.num_heads, plan.seqlen_q), np.float32)
    l = cupy.empty(m.shape, np.float32)  # noqa: E741
    jit.get_kernel(_statistics_spec(plan))(
        (plan.batch * plan.num_q_tiles * plan.num_heads,), (128,),
        (
            arrays.tensor_view(q), arrays.tensor_view(k), k_mean, m, l, plan.shape_record,
            np.float32(plan.softmax_scale),
        ),
    )
    return m, l


def row_limits(m: Any, l: Any, quantized: Quantized, thresholds: Any, plan: Plan) -> Any:  # noqa: E741
    """What a row's scores have to exceed to select a block: y = m + ln(tau * l), as integers for int8 codes.

    m, l: what ``anchor_statistics`` returned. quantized: what ``quantize`` returned; int8 and int8-sp24 read its scales.
    thresholds: tau, a float or float32 [num_heads] on the same backend; NaN and values <= 0 select every block.

    Returns int8, int8-sp24: int32, floor(y / (softmax_scale * q_scale * k_scale)); int4: y, float32. NumPy:
    [batch, num_heads, seqlen_q]; CuPy: [batch, num_heads, padded_q]. SELECT_NONE or inf: the row never votes, as absent
    rows, rows that see no key and rows that query_stride skips; SELECT_ALL or -inf: it selects every visible block, as
    rows with a NaN or inf do. Nothing is checked here.
    """
    is_int4 = plan.estimator == "int4"
    if not arrays.is_cuda(m):
        limits = reference.row_limits(m, l, thresholds, plan)
        if is_int4:
            return limits
        k_scale = quantized.k_scale[:, :, None].repeat(plan.group_size, 1)
        return reference.integer_thresholds(limits, quantized.q_scale, k_scale, plan)
    cupy = arrays.import_cupy()
    limits = cupy.empty((plan.batch, plan.num_heads, plan.padded_q), np.float32 if is_int4 else np.int32)
    tau, tau_of_all = thresholds, np.float32(0)
    if not isinstance(thresholds, cupy.ndarray):
        with np.errstate(over="ignore"):  # a float beyond float32 is inf there: anchors alone
            tau, tau_of_all = _NULL, np.float32(thresholds)
    scales = (_NULL, _NULL) if is_int4 else (quantized.q_scale, quantized.k_scale)
    jit.get_kernel(_limits_spec(plan))(
        (ceil_div(plan.padded_q, 256), plan.num_heads, plan.batch), (256,),
        (m, l, tau, tau_of_all, *scales, limits, plan.shape_record, np.int32(plan.block_q), np.float32(plan.softmax_scale)),
    )
    return limits


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels that :func:`anchor_statistics` and :func:`row_limits` launch for this plan."""
    return [_statistics_spec(plan), _limits_spec(plan)]


def _statistics_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("anchor_statistics", (str(plan.head_dim), plan.element))


def _limits_spec(plan: Plan) -> jit.KernelSpec:
    return jit.KernelSpec("row_limits", ("false" if plan.estimator == "int4" else "true",))
