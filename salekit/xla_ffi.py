"""XLA's custom calls in Python: of its FFI (``xla/ffi/api/c_api.h``, API 0.1 to 0.5), what a handler needs.

XLA calls a handler with the address of a call frame, from a thread of its own; ctypes takes Python's lock for it. A
handler has the stage "execute" alone, and no trait that would let XLA record it into a command buffer (a CUDA graph of
XLA's). The structures are the header's; a frame is read as words, because each attribute of a ctypes structure costs as
much as several of them.
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Callable

import ml_dtypes
import numpy as np

from .errors import DtypeError

API_VERSION = (0, 5)  # the newest that this follows: later minor versions append, and say so in their sizes
OLDEST_VERSION = (0, 1)

_POINTER, _SIZE, _INT64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_METADATA_EXTENSION = 1  # XLA_FFI_Extension_Metadata
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_STRING = 4  # XLA_FFI_AttrType_STRING
_LOW_HALF = 0xFFFFFFFF  # of a word that holds an enum and padding

# XLA_FFI_DataType, of what calls may hold.
DTYPES = {
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    16: np.dtype(ml_dtypes.bfloat16),
    8: np.dtype(np.uint32),
}

INVALID_ARGUMENT, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, INTERNAL = 3, 8, 9, 13  # XLA_FFI_Error_Code


def _structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    """One of the header's structures; all begin with their size and a list of extensions."""
    head = (("struct_size", _SIZE), ("extension_start", _POINTER))
    return type(name, (ctypes.Structure,), {"_fields_": [*head, *fields]})


ApiVersion = _structure("ApiVersion", ("major_version", ctypes.c_int), ("minor_version", ctypes.c_int))
Api = _structure(
    "Api",
    ("api_version", ApiVersion),
    ("internal_api", _POINTER),
    ("XLA_FFI_Error_Create", _POINTER),
    ("XLA_FFI_Error_GetDetails", _POINTER),  # before 0.5 XLA_FFI_Error_GetMessage, which fills in no errc
    ("XLA_FFI_Error_Destroy", _POINTER),
    ("XLA_FFI_Handler_Register", _POINTER),
    ("XLA_FFI_Stream_Get", _POINTER),
)  # and more functions, which nothing here calls
Args = _structure("Args", ("size", _INT64), ("types", _POINTER), ("args", _POINTER))
Rets = _structure("Rets", ("size", _INT64), ("types", _POINTER), ("rets", _POINTER))
Attrs = _structure("Attrs", ("size", _INT64), ("types", _POINTER), ("names", _POINTER), ("attrs", _POINTER))
CallFrame = _structure(
    "CallFrame",
    ("api", _POINTER),
    ("ctx", _POINTER),
    ("stage", ctypes.c_int),
    ("args", Args),
    ("rets", Rets),
    ("attrs", Attrs),
)
Buffer = _structure("Buffer", ("dtype", ctypes.c_int), ("data", _POINTER), ("rank", _INT64), ("dims", _POINTER))
ErrorCreateArgs = _structure("ErrorCreateArgs", ("message", ctypes.c_char_p), ("errc", ctypes.c_int))
ErrorGetDetailsArgs = _structure(
    "ErrorGetDetailsArgs", ("error", _POINTER), ("message", ctypes.c_char_p), ("errc", ctypes.c_int)
)
ErrorDestroyArgs = _structure("ErrorDestroyArgs", ("error", _POINTER))
StreamGetArgs = _structure("StreamGetArgs", ("ctx", _POINTER), ("stream", _POINTER))


class InternalExtension(ctypes.Structure):
    _fields_ = [("struct_size", _SIZE), ("type", ctypes.c_int), ("next", _POINTER)]


class Metadata(ctypes.Structure):
    _fields_ = [("struct_size", _SIZE), ("api_version", ApiVersion), ("traits", ctypes.c_uint32)]


class MetadataExtension(ctypes.Structure):
    _fields_ = [("extension_base", InternalExtension), ("metadata", _POINTER)]


class ByteSpan(ctypes.Structure):
    _fields_ = [("ptr", _POINTER), ("len", _SIZE)]


class FfiError(RuntimeError):
    """XLA reported an error, or called in a way that this module does not know."""


@dataclass(slots=True)
class Call:
    """What a handler is called with.

    operands, results: for each buffer its kind (dtype of ``DTYPES``, *shape), row-major. addresses: of the operands,
    then of the results. attributes: the bytes of each attribute that is a string.
    """

    operands: tuple
    results: tuple
    addresses: list[int]
    attributes: dict[bytes, bytes]
    api: int
    context: int

    def stream(self) -> int:
        """The ``cudaStream_t`` that XLA runs this call on. FfiError where there is none."""
        args = StreamGetArgs(ctypes.sizeof(StreamGetArgs), None, self.context, None)
        _check(self.api, _api_function(self.api, "XLA_FFI_Stream_Get")(ctypes.addressof(args)))
        return args.stream or 0


# --- reading -------------------------------------------------------------------------------------------------------
# All memory, as bytes: unpacking from it takes a quarter of the time of a ctypes array made at an address.
_MEMORY = memoryview((ctypes.c_uint8 * (1 << 56)).from_address(0))


class _Unpackers(dict):
    """For each count the function that unpacks so many numbers from memory: ``unpackers[count](_MEMORY, address)``."""

    def __init__(self, letter: str):
        super().__init__()
        self._letter = letter

    def __missing__(self, count: int) -> Callable[[memoryview, int], tuple[int, ...]]:
        return self.setdefault(count, struct.Struct(f"{count}{self._letter}").unpack_from)


_WORDS, _INTS, _BYTES = _Unpackers("Q"), _Unpackers("i"), _Unpackers("s")


def _words(address: int, count: int) -> tuple[int, ...]:
    """``count`` words of memory."""
    return _WORDS[count](_MEMORY, address)


def _word(structure: type, *path: str) -> int:
    """The index of a field in the words of a structure."""
    offset = 0
    for name in path:
        offset += getattr(structure, name).offset
        structure = dict((field[0], field[1]) for field in structure._fields_)[name]
    return offset // 8


_FRAME_WORDS = ctypes.sizeof(CallFrame) // 8
_BUFFER_WORDS = ctypes.sizeof(Buffer) // 8
_STRUCT_SIZE = _word(CallFrame, "struct_size")
_EXTENSION, _API, _CTX, _STAGE = (_word(CallFrame, name) for name in ("extension_start", "api", "ctx", "stage"))
_NUM_ARGS, _ARGS = (_word(CallFrame, "args", name) for name in ("size", "args"))
_NUM_RETS, _RETS = (_word(CallFrame, "rets", name) for name in ("size", "rets"))
_NUM_ATTRS, _TYPES, _NAMES, _ATTRS = (_word(CallFrame, "attrs", name) for name in ("size", "types", "names", "attrs"))
_DTYPE, _DATA, _RANK, _DIMS = (_word(Buffer, name) for name in ("dtype", "data", "rank", "dims"))


def _buffers(pointers: int, count: int, addresses: list[int]) -> tuple:
    """The kinds of ``count`` buffers; their addresses are appended to ``addresses``."""
    kinds = []
    unpack = _WORDS[_BUFFER_WORDS]
    for pointer in _WORDS[count](_MEMORY, pointers):
        buffer = unpack(_MEMORY, pointer)
        kinds.append((buffer[_DTYPE] & _LOW_HALF, *_WORDS[buffer[_RANK]](_MEMORY, buffer[_DIMS])))
        addresses.append(buffer[_DATA])
    return tuple(kinds)


def _span(address: int) -> bytes:
    pointer, length = _words(address, 2)
    return _BYTES[length](_MEMORY, pointer)[0]


def read_call(frame: tuple[int, ...]) -> Call:
    """The call of a frame of which ``frame`` are the words."""
    addresses: list[int] = []
    operands = _buffers(frame[_ARGS], frame[_NUM_ARGS], addresses)
    results = _buffers(frame[_RETS], frame[_NUM_RETS], addresses)
    attributes = {}
    count = frame[_NUM_ATTRS]
    types = _INTS[count](_MEMORY, frame[_TYPES])
    for kind, name, value in zip(types, _words(frame[_NAMES], count), _words(frame[_ATTRS], count)):
        if kind == _STRING:
            attributes[_span(name)] = _span(value)
    return Call(operands, results, addresses, attributes, frame[_API], frame[_CTX])


def describe(kind: tuple) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, bytes) of a buffer of that kind. DtypeError for a dtype that no call has."""
    if kind[0] not in DTYPES:
        wanted = ", ".join(str(dtype) for dtype in DTYPES.values())
        raise DtypeError(f"got a buffer of XLA's data type {kind[0]}; wants {wanted}")
    dtype = DTYPES[kind[0]]
    return dtype, kind[1:], math.prod(kind[1:]) * dtype.itemsize


def host_array(kind: tuple, address: int) -> np.ndarray:
    """The NumPy array of a buffer in host memory."""
    dtype, shape, num_bytes = describe(kind)
    if num_bytes == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(_MEMORY[address : address + num_bytes], dtype).reshape(shape)


# --- XLA's functions -----------------------------------------------------------------------------------------------
_FUNCTION = ctypes.PYFUNCTYPE(_POINTER, _POINTER)  # they are short: Python's lock is kept


@lru_cache(maxsize=None)
def _api_function(api: int, name: str) -> Any:
    offset = getattr(Api, name).offset
    if Api.from_address(api).struct_size < offset + ctypes.sizeof(_POINTER):
        raise FfiError(f"this XLA has no {name}")
    return _FUNCTION(_words(api + offset, 1)[0])


def _check(api: int, error: int | None) -> None:
    """FfiError with what an XLA_FFI_Error says, which is destroyed."""
    if error:
        details = ErrorGetDetailsArgs(ctypes.sizeof(ErrorGetDetailsArgs), None, error)
        _api_function(api, "XLA_FFI_Error_GetDetails")(ctypes.addressof(details))
        text = (details.message or b"").decode("utf-8", "replace")
        destroy = ErrorDestroyArgs(ctypes.sizeof(ErrorDestroyArgs), None, error)
        _api_function(api, "XLA_FFI_Error_Destroy")(ctypes.addressof(destroy))
        raise FfiError(text)


def _new_error(api: int, code: int, message: str) -> int:
    """A new XLA_FFI_Error, which XLA destroys."""
    text = message.replace("\0", " ").encode("utf-8", "replace")
    args = ErrorCreateArgs(ctypes.sizeof(ErrorCreateArgs), None, text, code)
    return _api_function(api, "XLA_FFI_Error_Create")(ctypes.addressof(args))


# --- handlers ------------------------------------------------------------------------------------------------------
_HANDLER = ctypes.CFUNCTYPE(_POINTER, _POINTER)
_handlers: list[Any] = []  # XLA never forgets a handler, so nor may Python


def _answer_metadata(frame: tuple[int, ...]) -> None:
    """XLA asks for the handler's API version, at registration. No traits: not for command buffers."""
    runtime = OLDEST_VERSION  # does not say its own here, and takes no other
    if frame[_API]:
        version = Api.from_address(frame[_API]).api_version
        runtime = (version.major_version, version.minor_version)
    if runtime[0] != API_VERSION[0]:
        raise FfiError(f"this XLA has FFI {runtime[0]}.{runtime[1]}; wants {API_VERSION[0]}.x")
    extension = MetadataExtension.from_address(frame[_EXTENSION])
    metadata = Metadata.from_address(extension.metadata)
    if metadata.struct_size < Metadata.traits.offset + ctypes.sizeof(ctypes.c_uint32):
        raise FfiError("XLA's metadata are smaller than FFI 0.1 has them")
    metadata.api_version.struct_size = ctypes.sizeof(ApiVersion)
    metadata.api_version.extension_start = None
    metadata.api_version.major_version, metadata.api_version.minor_version = min(runtime, API_VERSION)
    metadata.traits = 0


def _is_metadata_query(frame: tuple[int, ...]) -> bool:
    extension = frame[_EXTENSION]
    return bool(extension) and InternalExtension.from_address(extension).type == _METADATA_EXTENSION


def make_handler(execute: Callable[[Call], None], explain: Callable[[BaseException], tuple[int, str]]) -> Any:
    """A C function that runs ``execute`` for each call, for ``jax.ffi.pycapsule``; never freed.

    Whatever ``execute`` raises becomes XLA's error; ``explain(exception)`` is its code and message.
    """

    def handle(address: int) -> int | None:
        frame: tuple[int, ...] = ()
        try:
            frame = _words(address, _FRAME_WORDS)
            if frame[_STRUCT_SIZE] < 8 * _FRAME_WORDS:
                raise FfiError(f"the call frame has {frame[_STRUCT_SIZE]} bytes; wants {8 * _FRAME_WORDS}")
            if _is_metadata_query(frame):
                _answer_metadata(frame)
                return None
            if frame[_STAGE] & _LOW_HALF != _EXECUTE:
                raise FfiError(f"called in stage {frame[_STAGE] & _LOW_HALF}; wants {_EXECUTE}, execute")
            execute(read_call(frame))
            return None
        except BaseException as error:  # an exception that leaves this function would be lost, and XLA none the wiser
            # Without an API it is a query of metadata, and XLA will miss the version.
            return _new_error(frame[_API], *explain(error)) if frame[_API] else None

    handler = _HANDLER(handle)
    _handlers.append(handler)
    return handler
