"""GPU memory that runs out: whose error it is, what it says, and one more attempt with less in use."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Iterator, TypeVar

from . import workspaces
from .errors import DriverError, OutOfMemoryError

_CUDA_OUT_OF_MEMORY = 2  # of the driver and of the runtime

Result = TypeVar("Result")


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory ran out: an allocator's, or CUDA's, which also allocates when it launches."""
    if isinstance(error, MemoryError):
        return not isinstance(error, OutOfMemoryError)
    is_of_cuda = isinstance(error, DriverError) or type(error).__name__ in ("CUDADriverError", "CUDARuntimeError")
    return is_of_cuda and error.status == _CUDA_OUT_OF_MEMORY


@contextmanager
def for_a_context(device: int) -> Iterator[None]:
    """Around the first use of a GPU: OutOfMemoryError where the process's CUDA context finds no room there."""
    try:
        yield
    except Exception as error:
        if not is_short(error):
            raise
        raise OutOfMemoryError(
            f"out of memory on cuda:{device}: other processes leave less than a CUDA context takes; wait for them, or "
            "take another GPU with CUDA_VISIBLE_DEVICES"
        ) from None


def explained(error: BaseException, num_bytes: int, what: str, advice: str) -> OutOfMemoryError:
    """The error to raise for another that :func:`is_short`, on the current device.

    num_bytes: what was wanted, where ``error`` does not say it; 0: nobody knows. what: what for (of what the driver
    wanted: to what end). advice: what to change.
    """
    import cupy

    wanted, limit = getattr(error, "_size", 0) or num_bytes, getattr(error, "_limit", 0)
    try:
        free, total = cupy.cuda.runtime.memGetInfo()
        pooled = cupy.get_default_memory_pool().free_bytes()
        where = f"{free:,} of {total:,} are free"
        where += f", and {pooled:,} in CuPy's pool" if pooled else ""
    except cupy.cuda.runtime.CUDARuntimeError:  # the device itself has failed
        free, where = 0, "how many are free cannot be told"
    if limit:
        where += f"; CuPy's pool is limited to {limit:,}, of which {getattr(error, '_total', 0):,} are in use"
    return OutOfMemoryError(
        f"out of memory on cuda:{cupy.cuda.runtime.getDevice()}: "
        + (f"wants {wanted:,} bytes, for {what}" if wanted else f"the driver has none {what}")
        + f"; {where}. {advice}",
        wanted, free,
    )


def once_more(run: Callable[[], Result], num_bytes: int, what: str, advice: str) -> Result:
    """``run()`` after it :func:`is_short` and without what salekit and CuPy's pool keep for later; OutOfMemoryError if
    that is not enough, either. The pool has given it up where it was itself short, but not where the driver was.

    To be called outside of the handler of the first error: in it, the frames that the error passed are alive, with
    what the first attempt had allocated.
    """
    import cupy

    workspaces.clear_workspaces()
    cupy.get_default_memory_pool().free_all_blocks()
    try:
        return run()
    except Exception as error:
        if not is_short(error):
            raise
        if not isinstance(error, MemoryError):
            num_bytes, what = 0, f"to launch {what}"
        failure = explained(error, num_bytes, what, advice)
    raise failure  # not in the handler, either: an error that is kept would keep memory
