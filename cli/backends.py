"""Where a command computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from salekit.errors import GpuError

from . import render


def use_gpu(backend: str, otherwise: str | None = None) -> bool:
    """Whether ``--backend`` means the GPU. "auto" without one says ``otherwise``, if given, on stderr; "cuda" raises
    GpuError."""
    if backend == "numpy":
        return False
    try:
        from salekit.jit import device_arch

        device_arch()
        return True
    except GpuError:
        if backend == "cuda":
            raise
        if otherwise is not None:
            render.note(f"no usable GPU: {otherwise}")
        return False


def on_gpu(*arrays: np.ndarray) -> tuple[Any, ...]:
    """Copies on the current GPU."""
    import cupy

    return tuple(cupy.asarray(x) for x in arrays)
