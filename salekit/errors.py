"""Errors. Everything salekit raises on purpose is a ``SalekitError``; each child also is what Python users expect."""

from __future__ import annotations


class SalekitError(Exception):
    """Base of every error that salekit raises on purpose."""


class ArgumentError(SalekitError, ValueError):
    """An argument has a value, shape or combination that cannot work."""


class DtypeError(SalekitError, TypeError):
    """An argument has a type or dtype that is not supported."""


class GpuError(SalekitError, RuntimeError):
    """There is no GPU, no CuPy, or a GPU that no kernel supports."""


class DriverError(GpuError):
    """The NVIDIA driver failed at something. status: its CUresult."""

    def __init__(self, what: str, status: int):
        super().__init__(f"{what} failed with CUDA error {status}")
        self.what, self.status = what, status

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.status)


class CompileError(SalekitError, RuntimeError):
    """A kernel did not compile."""


class OutOfMemoryError(SalekitError, MemoryError):
    """There is not enough GPU memory. wanted_bytes, free_bytes: of the allocation that failed, and of the GPU then."""

    def __init__(self, message: str, wanted_bytes: int = 0, free_bytes: int = 0):
        super().__init__(message)
        self.wanted_bytes, self.free_bytes = wanted_bytes, free_bytes


class CacheWarning(UserWarning):
    """The cache of compiled kernels cannot be used, for the reason given: each process compiles anew."""


class FileFormatError(SalekitError, ValueError):
    """A file is truncated, malformed, or not what was expected. One line, and nothing that moves a terminal's cursor,
    whatever the file holds."""

    def __init__(self, message: str):
        super().__init__(shortened(escaped(message)))


def escaped(text: str, keep: str = "") -> str:
    """A text whose control characters (line ends, too), but those to ``keep``, are written as Python writes them."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() or x in keep else repr(x)[1:-1] for x in text)


def shortened(text: str, most: int = 2000) -> str:
    """A text without its middle, when it is long: what a file holds has no bound."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
