"""CUDA does not survive a fork: a child of a process that had started it gets one clear error for what needs a GPU."""

from __future__ import annotations

import os
import sys

from .errors import GpuError

is_dead = False  # CUDA, in this process, from its start
_was_started = False


def _before() -> None:
    """In the parent: whether CUDA is started. The question itself starts nothing."""
    global _was_started
    cupy = sys.modules.get("cupy")
    try:
        cupy.cuda.driver.ctxGetCurrent()
        _was_started = True
    except Exception:  # no CuPy, no driver, or CUDA is not started; in a child it always says the last
        _was_started = False


def _after_in_child() -> None:
    global is_dead
    is_dead = is_dead or _was_started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)


def check() -> None:
    """GpuError when CUDA is dead here."""
    if is_dead:
        raise GpuError(
            "this process was forked after its parent had started CUDA, which does not work in a child: start it with "
            'multiprocessing\'s "spawn" or "forkserver", or fork before the GPU is first used; NumPy arrays work here'
        )
