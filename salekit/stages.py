"""The stages for callers: each names an array of another library, which it does not take. Calls run them without."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any, Callable, TypeVar

import numpy as np

from . import programs
from .anchors import anchor_statistics, row_limits
from .attend import attend
from .block_scores import block_scores, mask_from_scores
from .errors import ArgumentError
from .estimate import estimate
from .quantize import quantize

Stage = TypeVar("Stage", bound=Callable[..., Any])


def _public(stage: Stage, imported: str = "") -> Stage:
    """``stage`` with ArgumentError for arrays that are neither NumPy's nor CuPy's; ``imported`` may be any."""
    names = tuple(inspect.signature(stage).parameters)

    @wraps(stage)
    def public(*args: Any, **options: Any) -> Any:
        for name, x in (*zip(names, args), *options.items()):
            if isinstance(x, np.ndarray) or programs.is_gpu_array(x) or name == imported:
                continue
            if hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__"):
                raise ArgumentError(f"{name}: got {type(x).__name__}; a stage wants NumPy or CuPy arrays")
        return stage(*args, **options)

    public.__module__ = __name__  # where pickle finds it
    return public


anchor_statistics, row_limits, quantize, estimate, attend, block_scores = map(
    _public, (anchor_statistics, row_limits, quantize, estimate, attend, block_scores)
)
mask_from_scores = _public(mask_from_scores, "thresholds")
