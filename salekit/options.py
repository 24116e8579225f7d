"""Options in: what a caller passes beside arrays, checked, as a Plan."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import numpy as np

from . import arrays, jit
from .errors import ArgumentError
from .plans import (
    BLOCKS,
    DENSE_BELOW,
    ESTIMATORS,
    LOW_BIT_ARCHS,
    LOW_BIT_HEAD_DIMS,
    POOLED_HEAD_DIMS,
    QUERY_STRIDES,
    SKIPPED,
    Plan,
    default_softmax_scale,
    resolve_estimator,
)

MAX_SEQLEN = 2**30  # positions, and sums of two of them, are int32 in the kernels


def check_count(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0 or isinstance(value, bool):
        raise ArgumentError(f"{name}: got {value!r}; wants an integer >= 0")
    return min(count, MAX_SEQLEN)


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}: got {value!r}; wants True or False")
    return bool(value)


def _check_choice(name: str, value: Any, choices: tuple) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ArgumentError(f"{name}: got {value!r}; wants one of {', '.join(map(repr, choices))}")
    return value


def _check_scale(value: Any, head_dim: int) -> float:
    if value is None:
        return default_softmax_scale(head_dim)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ArgumentError(f"softmax_scale: got {value!r}; wants a finite number > 0 or None")
    scale = float(value)
    # Kernels hold it in float32: it must survive the cast.
    if not (math.isfinite(scale) and 1e-37 <= scale <= 1e37):
        raise ArgumentError(f"softmax_scale: got {value!r}; wants a finite number > 0 (1e-37 to 1e37)")
    return scale


def _check_block(block: Any) -> tuple[int, int]:
    try:
        pair = tuple(operator.index(size) for size in block)
    except TypeError:
        pair = ()
    if pair not in BLOCKS:
        raise ArgumentError(f"block: got {block!r}; wants one of {', '.join(map(str, BLOCKS))}")
    return pair


def _check_softcap(value: Any, scale: float) -> float:
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"softcap: got {value!r}; wants a finite number >= 0")
    cap = float(value)
    # Kernels hold it and softmax_scale / softcap in float32.
    if cap != 0 and not (1e-37 <= cap <= 1e37 and 1e-37 <= scale / cap <= 1e37):
        raise ArgumentError(
            f"softcap: got {value!r}; wants 0 (off) or a finite number > 0 (1e-37 to 1e37, as softmax_scale / softcap)"
        )
    return cap


def _check_window(window: Any, causal: bool, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """(left, right) as a Plan holds them: -1 where the window hides nothing that ``causal`` does not."""
    if window is None:
        return -1, -1
    if isinstance(window, (int, np.integer)) and not isinstance(window, bool) and window >= 1:
        sides = (int(window) - 1,) * 2  # the row's own key is one of them
    else:
        try:
            sides = tuple(-2 if isinstance(side, (bool, np.bool_)) else operator.index(side) for side in window)
        except TypeError:
            sides = ()
    if len(sides) != 2 or min(sides) < -1:
        raise ArgumentError(
            f"window_size: got {window!r}; wants None, an integer >= 1 or a pair (left, right) of integers >= -1"
        )
    left, right = sides
    return (
        left if left < seqlen_k - 1 else -1,
        right if not causal and right < seqlen_q - 1 else -1,
    )


def plan_of_views(
    q: Any,
    k: Any,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    estimator: str = "auto",
    attend: str = "exact",
    block: tuple[int, int] = (128, 32),
    query_stride: int = 1,
    full_rows: int = 1024,
    sink: int = 32,
    local: int = 128,
    dense_below: int = DENSE_BELOW,
    skipped: str = "drop",
    softcap: float = 0.0,
    window_size: int | tuple[int, int] | None = None,
    longest: tuple[int, int] | None = None,
) -> Plan:
    """The Plan of checked bshd views. longest: (seqlen_q, seqlen_k) where the views hold sequences of up to that."""
    _check_choice("estimator", estimator, ("auto", *ESTIMATORS))
    _check_choice("attend", attend, ("exact", "int8-fp8"))
    _check_choice("skipped", skipped, SKIPPED)
    block_q, block_k = _check_block(block)
    stride = check_count("query_stride", query_stride)
    _check_choice("query_stride", stride, QUERY_STRIDES)
    arch = None
    if arrays.is_cuda(q):
        arch = jit.device_arch()
        if attend == "int8-fp8" and arch not in LOW_BIT_ARCHS:
            wanted = ", ".join(LOW_BIT_ARCHS)
            raise ArgumentError(f"attend: 'int8-fp8' is built for {wanted} alone, this GPU is {arch}; wants 'exact'")
    batch, _, num_heads, head_dim = q.shape
    seqlen_q, seqlen_k = longest or (q.shape[1], k.shape[1])
    causal, scale = check_flag("causal", causal), _check_scale(softmax_scale, head_dim)
    softcap = _check_softcap(softcap, scale)
    window_left, window_right = _check_window(window_size, causal, seqlen_q, seqlen_k)
    if attend == "int8-fp8" and head_dim not in LOW_BIT_HEAD_DIMS:
        wanted = " and ".join(map(str, LOW_BIT_HEAD_DIMS))
        raise ArgumentError(f"attend: 'int8-fp8' takes head_dim {wanted}, q has {head_dim}; wants 'exact'")
    if attend == "int8-fp8" and (softcap or window_left >= 0 or window_right >= 0):
        raise ArgumentError("attend: 'int8-fp8' has no softcap and no window_size; wants 'exact'")
    if skipped == "pool" and head_dim not in POOLED_HEAD_DIMS:
        wanted = " and ".join(map(str, POOLED_HEAD_DIMS))
        raise ArgumentError(f"skipped: 'pool' takes head_dim {wanted}, q has {head_dim}; wants 'drop'")
    if skipped == "pool" and (softcap or window_left >= 0 or window_right >= 0):
        raise ArgumentError("skipped: 'pool' has no softcap and no window_size; wants 'drop'")
    return Plan(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=num_heads,
        num_kv_heads=k.shape[2],
        head_dim=head_dim,
        dtype=arrays.DTYPE_NAMES[q.dtype],
        estimator=resolve_estimator(estimator, arch),
        attend=attend,
        block_q=block_q,
        block_k=block_k,
        query_stride=stride,
        arch=arch,
        causal=causal,
        softmax_scale=scale,
        full_rows=check_count("full_rows", full_rows),
        sink=check_count("sink", sink),
        local=check_count("local", local),
        dense_below=check_count("dense_below", dense_below),
        skipped=skipped,
        softcap=softcap,
        window_left=window_left,
        window_right=window_right,
    )
