"""Options in: what a caller passes beside arrays, checked, as a Plan."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, TypedDict, Union

import numpy as np

from . import arrays, jit
from .errors import ArgumentError, shortened
from .plans import (
    BLOCKS,
    DENSE_BELOW,
    ESTIMATORS,
    LOW_BIT_ARCHS,
    LOW_BIT_HEAD_DIMS,
    MAX_SEQLEN,
    POOLED_HEAD_DIMS,
    QUERY_STRIDES,
    SKIPPED,
    Plan,
    default_softmax_scale,
    resolve_estimator,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack
elif sys.version_info >= (3, 11):
    from typing import Unpack
else:
    Unpack = Union  # so that Unpack[Options] is Options, where nobody asks

MAX_SOFTCAP = 1e4


class DenseOptions(TypedDict, total=False):
    """The options of a dense call that are values, for type checkers: ``**options: Unpack[DenseOptions]``."""

    causal: bool
    softmax_scale: float | None
    softcap: float
    window_size: int | tuple[int, int] | None


class Options(DenseOptions, total=False):
    """Those of a sparse call."""

    estimator: str
    attend: str
    block: tuple[int, int]
    query_stride: int
    full_rows: int
    sink: int
    local: int
    dense_below: int
    skipped: str


def shown(value: Any) -> str:
    """A value in a message. An integer of more than 4,300 digits has no repr."""
    try:
        return shortened(repr(value))
    except ValueError:
        return f"{type(value).__name__} of too many digits"


def as_float(value: Real) -> float:
    """The nearest float; infinite where there is none."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _as_integer(value: Any) -> Any:
    """The int that ``value`` stands for; ``value`` itself when that is none."""
    try:
        return value if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return value


def check_count(name: str, value: Any) -> int:
    count = _as_integer(value)
    if type(count) is not int or count < 0:
        raise ArgumentError(f"{name}: got {shown(value)}; wants an integer >= 0")
    return min(count, MAX_SEQLEN)


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}: got {shown(value)}; wants True or False")
    return bool(value)


def _check_choice(name: str, value: Any, choices: tuple) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ArgumentError(f"{name}: got {shown(value)}; wants one of {', '.join(map(repr, choices))}")
    return value


def _check_scale(value: Any, head_dim: int) -> float:
    if value is None:
        return default_softmax_scale(head_dim)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ArgumentError(f"softmax_scale: got {shown(value)}; wants a finite number > 0 or None")
    scale = as_float(value)
    # Kernels hold it in float32: it must survive the cast.
    if not (math.isfinite(scale) and 1e-37 <= scale <= 1e37):
        raise ArgumentError(f"softmax_scale: got {shown(value)}; wants a finite number > 0 (1e-37 to 1e37)")
    return scale


def check_block(block: Any) -> tuple[int, int]:
    try:
        pair = tuple(operator.index(size) for size in block)
    except TypeError:
        pair = ()
    if pair not in BLOCKS:
        raise ArgumentError(f"block: got {shown(block)}; wants one of {', '.join(map(str, BLOCKS))}")
    return pair


def _check_softcap(value: Any, scale: float) -> float:
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"softcap: got {shown(value)}; wants a finite number >= 0")
    cap = as_float(value)
    # Kernels hold it and softmax_scale / softcap in float32; their tanh is off by 2^-23, a score by softcap times that.
    if value != 0 and not (1e-37 <= cap <= MAX_SOFTCAP and 1e-37 <= scale / cap <= 1e37):
        wants = f"0 (off) or a finite number > 0 (1e-37 to {MAX_SOFTCAP:g}; softmax_scale / softcap 1e-37 to 1e37)"
        raise ArgumentError(f"softcap: got {shown(value)}; wants {wants}")
    return cap


def _check_window(window: Any) -> tuple[int, int]:
    """(left, right), -1 for a side without an end."""
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
            f"window_size: got {shown(window)}; wants None, an integer >= 1 or a pair (left, right) of integers >= -1"
        )
    return sides


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
    block_q, block_k = check_block(block)
    stride = _check_choice("query_stride", _as_integer(query_stride), QUERY_STRIDES)
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
    left, right = _check_window(window_size)
    # A Plan has -1 where the window hides nothing that ``causal`` does not.
    window_left = left if left < seqlen_k - 1 else -1
    window_right = right if not causal and right < seqlen_q - 1 else -1
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
        # Before a right end a block's last rows see keys that none before them sees. As it was asked for, not as these
        # lengths have it: a packed sequence is tested as by itself.
        query_stride=stride if causal or right < 0 else 1,
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


# What callers pass: ``longest`` is of the packed calls, which have checked it.
OPTIONS = frozenset(Options.__annotations__)
DENSE_OPTIONS = frozenset(DenseOptions.__annotations__)


def check_names(function: str, options: Mapping[str, Any], known: frozenset[str] = OPTIONS) -> None:
    """TypeError, in Python's words, where ``function`` got a keyword that is no option."""
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def checked_options(options: Mapping[str, Any], plan: Plan) -> dict:
    """The options that ``plan`` was made of, in Python's own types; they mean the same for arrays of such lengths."""
    other = dict(
        block=(plan.block_q, plan.block_k),
        window_size=(plan.window_left, plan.window_right),
        estimator=options.get("estimator"),  # of the plan it is that of one GPU
    )
    return {
        name: None if given is None else other[name] if name in other else getattr(plan, name)
        for name, given in options.items()
    }
