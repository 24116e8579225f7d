"""Files that nobody but their user can have written: a cubin is code, and to load it is to run it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MAX_LINKS = 40  # as many as Linux follows


def why_not_private(folder: Path) -> str | None:
    """How another user could put files into ``folder`` or put another folder in its place; None when none can.

    The folder, all folders above it and all links on the way have to be of this user or of root. None but them may
    write to the folder; above it, a folder that others write to needs the sticky bit, as /tmp has. A group that is
    the user's alone is the user. What is not there yet is fine. Access lists are not looked at; on Windows nothing is.
    """
    if os.name != "posix":
        return None
    pending = list(Path(os.path.abspath(folder)).parts[::-1])
    current, links = Path(pending.pop()), 0
    while True:
        try:
            if problem := _problem(current, is_last=not pending):
                return problem
            if not pending:
                return None
            name = pending.pop()
            if name == "..":  # of a link's target
                current = current.parent
                continue
            status = (current / name).lstat()
            if not stat.S_ISLNK(status.st_mode):
                current /= name
                continue
            links += 1
            if status.st_uid not in _trusted() or links > _MAX_LINKS:
                return f"{current / name} is a link of another user, or one of too many"
            target = Path(os.readlink(current / name))
            current = Path(target.anchor) if target.is_absolute() else current
            pending += target.parts[:0:-1] if target.is_absolute() else target.parts[::-1]
        except OSError:  # not there, or not to be looked at: whoever uses it will be told
            return None


def _problem(folder: Path, is_last: bool) -> str | None:
    status = folder.lstat()
    if status.st_uid not in _trusted():
        return f"{folder} belongs to another user (uid {status.st_uid})"
    if status.st_mode & stat.S_ISVTX and not is_last:
        return None
    if status.st_mode & stat.S_IWOTH:
        return f"{folder} can be written by every user"
    if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
        return f"{folder} can be written by its group (gid {status.st_gid})"
    return None


def _trusted() -> tuple[int, int]:
    return 0, os.geteuid()


def _is_own_group(gid: int) -> bool:
    """Whether a group is the one that many systems make for each user, with nobody else in it."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def read_private(path: Path) -> bytes:
    """The bytes of a file. PermissionError for a link, for what is no plain file, and for what another user owns or can
    write; any other OSError as it comes."""
    if os.name != "posix":
        return path.read_bytes()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        is_open = status.st_mode & stat.S_IWOTH or (
            status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
        )
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in _trusted() or is_open:
            raise PermissionError(f"{path} is not a plain file of this user alone")
        return file.read()


def make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, each for this user alone."""
    if not folder.is_dir():
        if folder.parent != folder:
            make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
