"""Files that anybody may have made: JSON and npz archives in bounded memory, nothing run, one clear error.

NumPy's own reader allocates what a header declares and inflates without a bound, and opening a pipe waits for ever.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Iterable

import numpy as np

from .errors import FileFormatError

MAX_JSON_BYTES = 64 * 2**20  # of a JSON file; Python's objects take some ten times that
MAX_META_BYTES = 4 * 2**20  # of an archive's __meta__
MAX_DIRECTORY_BYTES = 4 * 2**20  # of an archive's list of members: some 60,000 of them
MAX_NPY_HEADER_BYTES = 4096
MAX_EXPANSION = 200  # bytes that come of one byte of an archive ...
FREE_EXPANSION = 2**28  # ... beyond this many, which every archive may have
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes
_CHUNK = 2**20


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, open to read. FileFormatError, at once, for what is missing, a folder, a pipe or a device."""
    try:
        # O_NONBLOCK: a pipe without a writer would be waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileFormatError(f"{path}: is not a plain file; wants one, not a folder, a pipe or a device")
            return open(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_json(text: str | bytes, name: str) -> Any:
    """JSON in which no object has a key twice (readers differ in which of them counts). FileFormatError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"an object has {key!r} twice")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{name}: is not JSON: {error}") from error
    except MemoryError:
        raise FileFormatError(f"{name}: does not fit in memory") from None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file of at most MAX_JSON_BYTES. FileFormatError."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path}: has {size} bytes; wants at most {MAX_JSON_BYTES}")
        try:
            data = file.read(MAX_JSON_BYTES)
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(data, str(path))


class Npz:
    """An npz archive. ``names``: its arrays but ``__meta__``, in order. To be used with ``with``. FileFormatError.

    Nothing is unpickled and nothing is written to disk, whatever the members are called. What is read is at most
    FREE_EXPANSION bytes at a time, or MAX_EXPANSION times the archive's size if that is more.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self._file = open_plain(path)
        self._size = os.fstat(self._file.fileno()).st_size
        try:
            try:
                self._archive = zipfile.ZipFile(_Bounded(self._file))
            except zipfile.BadZipFile:
                self._file.seek(0)
                what = "a single array, not" if self._file.read(6) == np.lib.format.MAGIC_PREFIX else "not"
                raise FileFormatError(f"{path}: is {what} an npz archive") from None
            except Exception as error:  # a damaged list of members raises several unrelated types
                raise FileFormatError(f"{path}: is not a whole npz file: {error}") from error
            self._members: dict[str, zipfile.ZipInfo] = {}
            for member in self._archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in self._members:
                    raise FileFormatError(f"{path}: holds {name!r} twice")
                self._members[name] = member
        except BaseException:
            self._file.close()
            raise
        self.names = [name for name in self._members if name != "__meta__"]

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def arrays(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """These arrays, by name."""
        names = list(names)
        self.check_bytes(sum(self._members[name].file_size for name in names))
        return {name: self._array(name) for name in names}

    def check_bytes(self, total: int) -> None:
        """FileFormatError when what comes of the archive has so many bytes that it may be a bomb."""
        bound = max(FREE_EXPANSION, MAX_EXPANSION * self._size)
        if total > bound:
            raise FileFormatError(
                f"{self.path}: {self._size} bytes would expand to {total}; wants at most {bound}. If they are what "
                "they should be, write them without compression (numpy.savez)"
            )

    def metadata(self) -> Any:
        """The JSON in ``__meta__``, or {} without it."""
        if "__meta__" not in self._members:
            return {}
        if self._members["__meta__"].file_size > MAX_META_BYTES:
            raise FileFormatError(f"{self.path}: __meta__ has more than {MAX_META_BYTES} bytes")
        text = self._array("__meta__")
        if text.dtype.kind != "U" or text.shape != ():
            raise FileFormatError(f"{self.path}: __meta__ is not a text")
        try:
            content = str(text[()])
        except (ValueError, SystemError) as error:  # numbers that are no characters
            raise FileFormatError(f"{self.path}: __meta__ is not a text: {error}") from error
        return parse_json(content, f"{self.path}: __meta__")

    def _array(self, name: str) -> np.ndarray:
        member = self._members[name]
        try:
            if member.compress_type not in _METHODS:
                raise ValueError("is packed in a way that NumPy does not use")
            with self._archive.open(member) as data:
                shape, is_fortran, dtype, header_bytes = _npy_header(data)
                num_bytes = math.prod(shape) * dtype.itemsize
                if header_bytes + num_bytes != member.file_size:
                    raise ValueError(f"its header declares {num_bytes} bytes, it has {member.file_size - header_bytes}")
                array = np.empty(num_bytes, np.uint8)
                into = memoryview(array)
                for start in range(0, num_bytes, _CHUNK):
                    part = data.read(min(_CHUNK, num_bytes - start))
                    into[start : start + len(part)] = part
                    if len(part) < min(_CHUNK, num_bytes - start):
                        raise ValueError("it ends early")
                data.read(1)  # at the end the checksum is compared
            array = array.view(dtype) if num_bytes else np.empty(0, dtype)
            return array.reshape(shape, order="F" if is_fortran else "C")
        except MemoryError:
            raise FileFormatError(f"{self.path}: {name}: {member.file_size} bytes do not fit in memory") from None
        except Exception as error:  # of damaged headers, streams and members: a dozen unrelated types
            raise FileFormatError(f"{self.path}: is not a whole npz file: {name}: {error}") from error


class _Bounded:
    """A file of which no more is read at a time than an archive's list of members may have: that list is read whole."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size if 0 <= size <= MAX_DIRECTORY_BYTES else MAX_DIRECTORY_BYTES + 1)
        if len(data) > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its list of members has more than {MAX_DIRECTORY_BYTES} bytes")
        return data


def _npy_header(data: Any) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether in Fortran's order, dtype, bytes of the header) of an .npy stream. ValueError among others."""
    start = data.read(8)
    if start[:6] != np.lib.format.MAGIC_PREFIX or start[6:] not in (b"\1\0", b"\2\0"):
        raise ValueError("it is no .npy array of a version that holds plain arrays")
    width = 2 if start[6] == 1 else 4
    length = data.read(width)
    if int.from_bytes(length, "little") > MAX_NPY_HEADER_BYTES:
        raise ValueError(f"its header has more than {MAX_NPY_HEADER_BYTES} bytes")
    text = data.read(int.from_bytes(length, "little"))
    read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(io.BytesIO(length + text))
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, is_fortran, dtype, 8 + width + len(text)
