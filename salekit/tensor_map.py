"""CUtensorMap records for the Hopper copy engine, encoded by the driver (``cuTensorMapEncodeTiled``)."""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import lru_cache

import numpy as np

from . import programs
from .errors import DriverError, GpuError

TENSOR_MAP = np.dtype([("opaque", "<u8", (16,))])
_FLOAT16, _BFLOAT16 = 6, 9  # CU_TENSOR_MAP_DATA_TYPE_*
_SWIZZLE_128B, _L2_256B = 3, 3


@lru_cache(maxsize=None)
def _driver(name: str):
    """The driver's ``cuTensorMap<name>``."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            function = getattr(ctypes.CDLL(library), f"cuTensorMap{name}")
            if name == "ReplaceAddress":
                function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
            return function
        except (OSError, AttributeError):
            continue
    raise GpuError(f"the NVIDIA driver has no cuTensorMap{name}; salekit's Hopper kernels need driver 525 or newer")


def can_encode(array) -> bool:
    """Whether a ``[batch, seqlen, heads, head_dim]`` view fits the copy engine: whole 16 bytes, no stride zero."""
    item = array.dtype.itemsize
    return (
        array.data.ptr % 16 == 0
        and all(
            size == 1 or (stride > 0 and stride % 16 == 0 and stride < 2**40)
            for size, stride in zip(array.shape[:3], array.strides[:3])
        )
        and array.strides[3] == item
    )


class _Encoder:
    """Encodes the maps of one array's shape and strides, at any address."""

    def __init__(self, is_bfloat16: bool, sizes: tuple, strides: tuple, box_rows: int):
        self._text = f"sizes {sizes}, strides {strides}"
        self._head = (ctypes.c_int(_BFLOAT16 if is_bfloat16 else _FLOAT16), ctypes.c_uint32(4))
        self._tail = (
            (ctypes.c_uint64 * 4)(*sizes),
            (ctypes.c_uint64 * 3)(*strides),
            (ctypes.c_uint32 * 4)(64, box_rows, 1, 1),
            (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            ctypes.c_int(0),
            ctypes.c_int(_SWIZZLE_128B),
            ctypes.c_int(_L2_256B),
            ctypes.c_int(0),
        )

    def encode(self, address: int, target: int) -> None:
        """Encode the map of the data at ``address`` into the host memory at ``target``, a multiple of 64."""
        self.check(_driver("EncodeTiled")(ctypes.c_void_p(target), *self._head, ctypes.c_void_p(address), *self._tail))

    def check(self, error: int) -> None:
        if error:
            raise DriverError(f"a tensor map for {self._text}", error)


class _DeferredMap(programs.Deferred):
    """The map of an array whose address a program gets later."""

    num_bytes = TENSOR_MAP.itemsize

    def __init__(self, address: int, encoder: _Encoder):
        self.address = address
        self._encoder = encoder
        self._written: set[int] = set()  # where maps are: several launches may have one argument

    def write(self, address: int, target: int) -> None:
        if target not in self._written:
            self._encoder.encode(address, target)
            self._written.add(target)
        else:
            error = _driver("ReplaceAddress")(target, address)
            if error:
                self._encoder.check(error)


@lru_cache(maxsize=256)
def _encode(pointer: int, *description) -> np.ndarray:
    raw = np.zeros(128 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    aligned = raw[start : start + 128]
    _Encoder(*description).encode(pointer, aligned.ctypes.data)
    return aligned.copy().view(TENSOR_MAP)


def tensor_map(array, box_rows: int, row_step: int = 1) -> np.ndarray | programs.Deferred:
    """A size-1 ``TENSOR_MAP`` record for a CuPy ``[batch, seqlen, heads, head_dim]`` 16-bit view.

    Row i of the map is row ``row_step * i`` of the view. Boxes are ``box_rows`` rows of 64 elements, written to shared
    memory with the 128-byte swizzle; coordinates are (element, row, head, batch). Raises GpuError when the driver
    refuses. While a program is recorded: what encodes the map when the program is linked.
    """
    programs.check_symbol(array)
    batch, seqlen, heads, head_dim = array.shape
    seqlen = -(-seqlen // row_step)
    sizes = (head_dim, seqlen, heads, batch)
    whole, row_stride = head_dim * array.dtype.itemsize, array.strides[1] * row_step
    strides = tuple(
        stride if size > 1 else whole
        for size, stride in ((seqlen, row_stride), (heads, array.strides[2]), (batch, array.strides[0]))
    )
    description = (array.dtype.name == "bfloat16", sizes, strides, box_rows)
    if programs.is_symbol(array):
        return _DeferredMap(array.data.ptr, _Encoder(*description))
    return _encode(array.data.ptr, *description)
