"""NVTX ranges named after the stages of a call, for Nsight: off, unless ``SALEKIT_NVTX=1`` or :func:`switched_on`.

What a call records while they are off stays without ranges: set the variable before the first call.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator

_switched_on = 0


def is_on() -> bool:
    return bool(_switched_on) or os.environ.get("SALEKIT_NVTX", "") not in ("", "0")


@contextmanager
def switched_on() -> Iterator[None]:
    """Ranges are on inside, in every thread."""
    global _switched_on
    _switched_on += 1
    try:
        yield
    finally:
        _switched_on -= 1


def functions() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    """(push a range of this name, pop it) for the calling thread, or None while ranges are off or CuPy has none."""
    if not is_on():
        return None
    try:
        from cupy.cuda import nvtx
    except ImportError:
        return None
    return nvtx.RangePush, nvtx.RangePop


@contextmanager
def span(name: str) -> Iterator[None]:
    """A range around what runs inside, where ranges are on."""
    found = functions()
    if found is None:
        yield
        return
    push, pop = found
    push(name)
    try:
        yield
    finally:
        pop()
