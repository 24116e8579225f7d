"""DLPack with bfloat16, which NumPy neither takes nor gives: such capsules pass it labelled as uint16.

A capsule holds a DLManagedTensor or, from DLPack 1.0 on, a DLManagedTensorVersioned (dlpack.h) that belongs to whoever
takes the capsule; its deleter does not look at the label.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

_BFLOAT16, _UINT16 = (4, 16, 1), (1, 16, 1)  # DLDataType: code, bits, lanes
_NAMES = (b"dltensor", b"dltensor_versioned")
_DTYPE_OFFSETS = (20, 52)  # bytes from the struct's start to its DLDataType: after data, device and ndim
_FLAGS_OFFSET = 24  # in the versioned struct
_READ_ONLY, _IS_COPIED = 1, 2

_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


def _relabel(capsule: Any, old: tuple, new: tuple) -> tuple[bool, int | None]:
    """Turn the label ``old`` of a capsule into ``new``: (whether it was old, the flags or None before DLPack 1.0)."""
    for name, offset in zip(_NAMES, _DTYPE_OFFSETS):
        if _is_valid(capsule, name):
            address = _get_pointer(capsule, name)
            label = _DataType.from_address(address + offset)
            flags = ctypes.c_uint64.from_address(address + _FLAGS_OFFSET).value if name == _NAMES[1] else None
            was_old = (label.code, label.bits, label.lanes) == old
            if was_old:
                label.code, label.bits, label.lanes = new
            return was_old, flags
    raise BufferError(f"__dlpack__ gave {capsule!r}; wants a capsule of a tensor that nobody has taken")


class _Relabelled:
    """A producer whose capsules with the label ``old`` get ``new``. was_old, flags: of the last capsule."""

    def __init__(self, producer: Any, old: tuple, new: tuple):
        self._producer, self._old, self._new = producer, old, new
        self.was_old, self.flags = False, None

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._producer.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._producer.__dlpack__(**options)
        self.was_old, self.flags = _relabel(capsule, self._old, self._new)
        if self.flags is not None and self.flags & _IS_COPIED:
            raise BufferError("__dlpack__ made a copy")
        return capsule


class _Writable:
    """An array's memory without its mark as read-only."""

    def __init__(self, array: np.ndarray):
        self.owner = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def import_dlpack(x: Any, from_dlpack: Any) -> tuple[Any, bool]:
    """The memory of a producer through ``from_dlpack``, NumPy's or CuPy's: (array, whether it may not be written).

    Before DLPack 1.0 a capsule cannot say that its memory is read-only, and a producer of such memory has to refuse.
    """
    producer = _Relabelled(x, _BFLOAT16, _UINT16)
    array = from_dlpack(producer)
    if producer.flags is None and isinstance(array, np.ndarray) and not array.flags.writeable:
        array = np.asarray(_Writable(array))
    is_read_only = producer.flags is not None and bool(producer.flags & _READ_ONLY)
    return (array.view(ml_dtypes.bfloat16) if producer.was_old else array), is_read_only


def as_dlpack(array: Any) -> Any:
    """A NumPy array for the ``from_dlpack`` of other libraries, without a copy.

    array: any array. One of bfloat16 (ml_dtypes) comes back as an object with ``__dlpack__`` and
    ``__dlpack_device__`` that exports its memory as DLPack's bfloat16, which NumPy's own DLPack does not have; the
    memory lives as long as what was made from it. Every other array, CuPy's of bfloat16 included, comes back as it is.
    """
    if isinstance(array, np.ndarray) and array.dtype == ml_dtypes.bfloat16:
        return _Relabelled(array.view(np.uint16), _UINT16, _BFLOAT16)
    return array
