"""Producers made by hand from the structs of dlpack.h: what libraries export that are not installed here."""

from __future__ import annotations

import ctypes

BFLOAT16, FLOAT16, UINT16 = (4, 16), (2, 16), (1, 16)  # code, bits
CPU, CUDA = (1, 0), (2, 0)
READ_ONLY, IS_COPIED = 1, 2
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", _DELETER),
        ("flags", ctypes.c_uint64), ("tensor", _Tensor),
    ]


_new = ctypes.PyDLL(None).PyCapsule_New  # pythonapi is one for all, and so are its argtypes
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Producer:
    """Memory at ``address``. strides: in elements, None for contiguous; flags: None for one before DLPack 1.0.

    released: how many capsules' deleters were called. streams: what ``__dlpack__`` was given.
    """

    def __init__(self, address, shape, dtype=BFLOAT16, strides=None, device=CPU, flags=None, byte_offset=0):
        self.address, self.shape, self.dtype, self.strides, self.device = address, shape, dtype, strides, device
        self.flags, self.byte_offset = flags, byte_offset
        self.released, self.streams, self._kept = 0, [], []

    @classmethod
    def of(cls, array, **options):
        """The memory of a NumPy array, which the producer does not keep."""
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return cls(array.ctypes.data, array.shape, strides=strides, **options)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.streams.append(stream)
        versioned = self.flags is not None and max_version is not None
        if self.flags == READ_ONLY and not versioned:
            raise BufferError("read-only memory wants DLPack 1.0")
        managed = (_Versioned if versioned else _Managed)()
        if versioned:
            managed.major, managed.flags = 1, self.flags
        managed.deleter = _DELETER(self._release)
        tensor, sizes = managed.tensor, ctypes.c_int64 * max(1, len(self.shape))
        tensor.data, tensor.byte_offset = self.address, self.byte_offset
        tensor.device_type, tensor.device_id = self.device
        tensor.code, tensor.bits, tensor.lanes, tensor.ndim = *self.dtype, 1, len(self.shape)
        tensor.shape = sizes(*self.shape)
        if self.strides is not None:
            tensor.strides = sizes(*self.strides)
        self._kept.append(managed)  # as long as the producer, which a test holds
        return _new(ctypes.addressof(managed), b"dltensor_versioned" if versioned else b"dltensor", None)

    def _release(self, _):
        self.released += 1


class Interface:
    """Memory with a CUDA array interface alone."""

    def __init__(self, address, shape, typestr, strides=None, stream=None, read_only=False, mask=None):
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (address, read_only), "version": 3, "strides": strides,
            "stream": stream, "mask": mask,
        }
