"""Files below a directory, reached without following a link: each step starts from the descriptor of the one before.

The directory itself is the user's choice and may be named through links. What lies below it may come from elsewhere (a clone,
an archive, a share), so a link, a pipe or a device there is nothing that anybody asked for: it counts as absent.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_REACH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
"""A directory that may be passed through need not be one that may be listed."""

_NOT_SUPPORTED = frozenset((errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY))
"""How a filesystem says that it does not know a call."""


def reach(path: str | Path, at: int | None = None) -> int:
    """As `directory`; the caller closes the descriptor."""
    if at is None:
        return os.open(path, _REACH)
    try:
        return os.open(path, _REACH | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        raise


@contextmanager
def directory(path: str | Path, at: int | None = None) -> Iterator[int]:
    """A descriptor of a directory, to reach what is in it.

    Args:
        path: of the directory; with `at`, its name in there, and a link or a file of that name counts as absent.
        at: descriptor of the directory around it.

    Raises:
        FileNotFoundError: there is none.
        OSError: as it comes.
    """
    descriptor = reach(path, at)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened(name: str, flags: int, at: int) -> Iterator[tuple[int, os.stat_result]]:
    """Descriptor and status of a regular file in a directory. New files get the mode that the user's umask allows.

    Raises:
        FileNotFoundError: there is none; whatever else has the name is neither opened nor waited for.
        OSError: as it comes.
    """
    descriptor, status = open_file(name, flags, at)
    try:
        yield descriptor, status
    finally:
        os.close(descriptor)


def open_file(name: str, flags: int, at: int) -> tuple[int, os.stat_result]:
    """As `opened`; the caller closes the descriptor."""
    if not flags & os.O_CREAT:  # already opening some devices does something
        _refuse_other(os.stat(name, dir_fd=at, follow_symlinks=False), name)
    try:
        descriptor = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO) and status_of(name, at) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
        raise
    try:
        status = os.fstat(descriptor)
        _refuse_other(status, name)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def status_of(name: str, at: int) -> os.stat_result | None:
    """Status of a regular file in a directory; None where there is none."""
    status = what_is(name, at)
    return status if status is not None and stat.S_ISREG(status.st_mode) else None


def what_is(name: str, at: int) -> os.stat_result | None:
    """Status of whatever has the name; None if nothing has."""
    try:
        return os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None


class FoundFile(NamedTuple):
    """What a name in a directory stands for."""

    name: str
    is_file: bool
    is_directory: bool


def entries_of(at: int) -> list[FoundFile]:
    """What is in a directory; a link is neither a file nor a directory."""
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    try:
        with os.scandir(descriptor) as entries:
            return [
                FoundFile(entry.name, entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False))
                for entry in entries
            ]
    finally:
        os.close(descriptor)


def files_of(at: int, wanted: Callable[[str], object]) -> Iterator[tuple[str, os.stat_result]]:
    """Names and statuses of the regular files in a directory whose names are wanted, as far as they are still there."""
    for found in entries_of(at):
        if found.is_file and wanted(found.name) and (status := status_of(found.name, at)) is not None:
            yield found.name, status


def is_named(name: str, at: int, descriptor: int) -> bool:
    """Whether an open file still has its name. (Some filesystems count no names, so that the count alone does not tell.)"""
    status = os.fstat(descriptor)
    if status.st_nlink:
        return True
    named = status_of(name, at)
    return named is not None and (named.st_dev, named.st_ino) == (status.st_dev, status.st_ino)


def make_directory(name: str, at: int) -> bool:
    """Make a directory unless there is one; whether it is new."""
    try:
        os.mkdir(name, dir_fd=at)
    except FileExistsError:
        return False
    return True


def sync_directory(at: int) -> None:
    """Bring names in a directory to the disk, where the filesystem can be asked to."""
    try:
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    except PermissionError:  # written to, but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED | {errno.EPERM, errno.EACCES, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """Bring a file's bytes to the disk, where the filesystem can be asked to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def replace_file(name: str, content: bytes | bytearray, at: int) -> None:
    """Let a file have this content, from one moment to the next. A link of that name is replaced, not followed."""
    partial = f"{name}.{secrets.token_hex(4)}"
    try:
        with opened(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, at) as (descriptor, _):
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.replace(partial, name, src_dir_fd=at, dst_dir_fd=at)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial, dir_fd=at)
        raise


def advice(error: OSError) -> str:
    """The system's word for what happened, and what to do about it."""
    remedies = {
        errno.ENOSPC: "free some space or choose another directory.",
        errno.EDQUOT: "your quota is used up; free some space or choose another directory.",
        errno.EROFS: "the filesystem is read-only; choose another directory.",
        errno.EACCES: "you lack the permission; choose another directory or change its mode.",
        errno.EPERM: "you lack the permission; choose another directory or change its mode.",
        errno.ENOTDIR: "a part of the path is a file; choose another directory.",
        errno.EIO: "the disk reports a fault; check it.",
    }
    what = os.strerror(error.errno) if error.errno else str(error)
    return f"{what}: {remedies.get(error.errno or 0, 'check the path and the disk.')}"


def _refuse_other(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
