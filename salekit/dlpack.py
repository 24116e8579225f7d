"""DLPack with bfloat16, which NumPy neither takes nor gives: such capsules pass it labelled as uint16.

A capsule holds a DLManagedTensor or, from DLPack 1.0 on, a DLManagedTensorVersioned (dlpack.h) that belongs to whoever
takes the capsule; its deleter does not look at the label.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

_BFLOAT16, _UINT16 = (code | 16 << 8 | 1 << 16 for code in (4, 1))  # DLDataType: code, bits and lanes in 32 bits
_DTYPE_OFFSETS = {b"dltensor": 20, b"dltensor_versioned": 52}  # bytes from the struct to its DLDataType
_FLAGS_OFFSET = 24  # in the versioned struct
_READ_ONLY, _IS_COPIED = 1, 2
_BFLOAT16_DTYPE = np.dtype(ml_dtypes.bfloat16)

_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype, _get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabel(capsule: Any, old: int, new: int) -> tuple[bool, int | None]:
    """Turn the label ``old`` of a capsule into ``new``: (whether it was old, the flags or None before DLPack 1.0)."""
    try:
        name = _get_name(capsule)
        offset = _DTYPE_OFFSETS[name]
    except (ValueError, KeyError):  # no capsule, or one of another name
        raise BufferError(f"__dlpack__ gave {capsule!r}; wants a capsule of a tensor that nobody has taken") from None
    address = _get_pointer(capsule, name)
    label = ctypes.c_uint32.from_address(address + offset)
    was_old = label.value == old
    if was_old:
        label.value = new
    flags = None if name == b"dltensor" else ctypes.c_uint64.from_address(address + _FLAGS_OFFSET).value
    return was_old, flags


class _Relabelled:
    """A producer whose capsules with the label ``old`` get ``new``. was_old, flags: of the last capsule."""

    def __init__(self, producer: Any, old: int, new: int):
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


def import_dlpack(x: Any, from_dlpack: Any, is_written: bool = False) -> tuple[Any, bool]:
    """The memory of a producer through ``from_dlpack``, NumPy's or CuPy's: (array, whether it may not be written).

    Before DLPack 1.0 a capsule cannot say that its memory is read-only, and a producer of such memory has to refuse;
    NumPy gives an array that cannot be written, which with ``is_written`` can.
    """
    producer = _Relabelled(x, _BFLOAT16, _UINT16)
    array = from_dlpack(producer)
    if is_written and producer.flags is None and isinstance(array, np.ndarray):
        array = np.asarray(_Writable(array))
    is_read_only = producer.flags is not None and bool(producer.flags & _READ_ONLY)
    return (array.view(_BFLOAT16_DTYPE) if producer.was_old else array), is_read_only


def as_dlpack(array: Any) -> Any:
    """A NumPy array for the ``from_dlpack`` of other libraries, without a copy.

    array: any array. One of bfloat16 (ml_dtypes) comes back as an object with ``__dlpack__`` and
    ``__dlpack_device__`` that exports its memory as DLPack's bfloat16, which NumPy's own DLPack does not have; the
    memory lives as long as what was made from it. Every other array, CuPy's of bfloat16 included, comes back as it is.
    """
    if isinstance(array, np.ndarray) and array.dtype == _BFLOAT16_DTYPE:
        return _Relabelled(array.view(np.uint16), _UINT16, _BFLOAT16)
    return array
