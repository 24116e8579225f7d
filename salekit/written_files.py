"""Files that commands write: whole or not at all, never in the place of a device, a pipe or a link."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Iterator

_IN_PLACE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV)  # where a file can be written, but not replaced


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A file for what ``path`` will hold when the block ends; until then, and after an error, that stays as it was.

    Of a link the target is written. What is there and is no plain file, a device or a pipe, is written to directly, and
    so is a file that exists in a folder where none can be made. A file that exists keeps its mode. Raises OSError, with
    the path when it is about this file.
    """
    partial = None
    try:
        mode, target = _mode_of(path), os.path.realpath(path)
        if mode is not None and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not _is_replaced(mode, target):
            with open(path, "wb") as file:
                yield file
            return
        partial = os.path.join(os.path.dirname(target), f".salekit-{secrets.token_hex(8)}.partial")
        try:
            file = open(partial, "xb")
        except OSError as error:  # no file can be made there; the one that is there can be written
            if mode is None or error.errno not in _IN_PLACE:
                raise
            file = open(target, "wb")
        try:
            with file:
                if mode is not None and file.name == partial:
                    os.chmod(partial, stat.S_IMODE(mode))
                yield file
            if file.name == partial:
                _put(partial, target, mode is not None)
        finally:
            with suppress(OSError):
                os.unlink(partial)
    except OSError as error:
        if error.errno is None or error.filename not in (None, partial):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # not the partial file's name


def _put(partial: str, target: str, is_there: bool) -> None:
    try:
        os.replace(partial, target)
    except OSError as error:  # a file that is mounted by itself can be written, not replaced
        if not is_there or error.errno not in _IN_PLACE:
            raise
        shutil.copyfile(partial, target)


def write(path: str | Path, content: str | bytes) -> None:
    """Make ``content`` (a text as UTF-8) that of a file, as :func:`writing` says."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _mode_of(path: str | Path) -> int | None:
    """None when nothing is there."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_replaced(mode: int | None, target: str) -> bool:
    """Whether it is a plain file, or none yet. One that is open but has no name any more (/dev/fd/3) is not."""
    return mode is None or (stat.S_ISREG(mode) and os.path.exists(target))


# --- before the work -----------------------------------------------------------------------------------------------
def check_output(option: str, path: str | None, *others: str | None) -> None:
    """Whether a command can write there, said before it works. others: its inputs and other outputs; None: not given.
    Raises click.UsageError."""
    if path is None:
        return
    if not path:
        _refuse(f"{option}: got an empty name; wants a file")
    if any(_is_same(path, other) for other in others if other):
        _refuse(f"{option}: got {path}, another file of this command; wants one of its own")
    if problem := _why_not_written(path):
        _refuse(f"{option}: got {path}; wants a file that can be written ({problem})")


def check_folder(option: str, path: str) -> None:
    """The same of a folder, which need not be there yet. Raises click.UsageError."""
    if not path:
        _refuse(f"{option}: got an empty name; wants a folder")
    if problem := why_not_made(Path(path)):
        _refuse(f"{option}: got {path}; wants a folder that can be written to ({problem})")


def _refuse(message: str) -> None:
    from click import UsageError  # which the library does without

    raise UsageError(message)


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return os.path.realpath(path) == os.path.realpath(other)


def _why_not_written(path: str) -> str | None:
    try:
        mode, target = _mode_of(path), os.path.realpath(path)
    except OSError as error:  # a link to itself, a name too long
        return error.strerror
    if mode is not None:
        return None if os.access(path, os.W_OK) and not stat.S_ISDIR(mode) else os.strerror(errno.EACCES)
    return why_not_writable(Path(target).parent)


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder; None when one can. Nothing is left there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror or error}"


def why_not_made(folder: Path) -> str | None:
    """:func:`why_not_writable`, of a folder that may have to be made first."""
    folder = Path(os.path.abspath(folder))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return why_not_writable(folder)
