"""What does not survive a fork: CUDA, once the parent had started it, and NVRTC, when a thread of the parent was
inside. A child gets one clear error for what needs them."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from typing import Iterator

from .errors import GpuError

is_dead = False  # CUDA, in this process, from its start
is_compiler_dead = False  # NVRTC, whose own locks a thread held that is not here
_was_started = False
_compiling: set[int] = set()  # threads that are inside NVRTC


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
    global is_dead, is_compiler_dead
    is_dead = is_dead or _was_started
    is_compiler_dead = is_compiler_dead or bool(_compiling)
    _compiling.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)


def check() -> None:
    """GpuError when CUDA is dead here."""
    if is_dead:
        raise GpuError(
            "this process was forked after its parent had started CUDA, which does not work in a child: start it with "
            'multiprocessing\'s "spawn" or "forkserver", or fork before the GPU is first used; NumPy arrays work here'
        )


@contextmanager
def compiling() -> Iterator[None]:
    """Around the use of NVRTC. GpuError when it is dead here: it would wait for ever."""
    if is_compiler_dead:
        raise GpuError(
            "this process was forked while its parent compiled a kernel, and cannot compile here: start it with "
            'multiprocessing\'s "spawn" or "forkserver", or fork when nothing compiles; kernels that the cache holds '
            "and NumPy arrays work here"
        )
    thread = threading.get_ident()
    _compiling.add(thread)
    try:
        yield
    finally:
        _compiling.discard(thread)
