"""Access to files below a directory without following links: each step starts from the descriptor of the step before.

The directory itself is the user's choice and may be named through links. Its contents may come from elsewhere (a clone, an
archive, a share), so a link, a pipe or a device there is not trusted and counts as absent.
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
"""O_PATH, since a directory that may be searched need not be one that may be listed."""

_NOT_SUPPORTED = frozenset((errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY))
"""Errors by which a filesystem reports an unsupported call."""


def reach(path: str | Path, at: int | None = None) -> int:
    """Opens a directory like `directory`; the caller closes the descriptor."""
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
    """Yields a descriptor of a directory, for access to its contents.

    Args:
        path: path of the directory; with `at`, its name in that directory, where a link or a file counts as absent.
        at: descriptor of the parent directory.

    Raises:
        FileNotFoundError: there is no such directory.
        OSError: passed through.
    """
    descriptor = reach(path, at)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened(name: str, flags: int, at: int) -> Iterator[tuple[int, os.stat_result]]:
    """Yields descriptor and status of a regular file in a directory. New files get the mode that the user's umask allows.

    Raises:
        FileNotFoundError: there is no such regular file; anything else of that name is neither opened nor waited for.
        OSError: passed through.
    """
    descriptor, status = open_file(name, flags, at)
    try:
        yield descriptor, status
    finally:
        os.close(descriptor)


def open_file(name: str, flags: int, at: int) -> tuple[int, os.stat_result]:
    """Opens a file like `opened`; the caller closes the descriptor."""
    if not flags & os.O_CREAT:  # merely opening some devices has an effect
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
    """Returns the status of a regular file in a directory; None if there is no such file."""
    status = what_is(name, at)
    return status if status is not None and stat.S_ISREG(status.st_mode) else None


def what_is(name: str, at: int) -> os.stat_result | None:
    """Returns the status of a directory entry of any kind; None if there is no such entry."""
    try:
        return os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None


class FoundFile(NamedTuple):
    """An entry of a directory: its name and kind."""

    name: str
    is_file: bool
    is_directory: bool


def entries_of(at: int) -> list[FoundFile]:
    """Returns a directory's entries; a link is neither a file nor a directory."""
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
    """Iterates over (name, status) of a directory's regular files with wanted names; files that vanish are skipped."""
    for found in entries_of(at):
        if found.is_file and wanted(found.name) and (status := status_of(found.name, at)) is not None:
            yield found.name, status


def is_named(name: str, at: int, descriptor: int) -> bool:
    """Returns whether an open file still has its name. (The link count alone does not tell: some filesystems keep none.)"""
    status = os.fstat(descriptor)
    if status.st_nlink:
        return True
    named = status_of(name, at)
    return named is not None and (named.st_dev, named.st_ino) == (status.st_dev, status.st_ino)


def make_directory(name: str, at: int) -> bool:
    """Creates a directory if it is missing; returns whether it is new."""
    try:
        os.mkdir(name, dir_fd=at)
    except FileExistsError:
        return False
    return True


def sync_directory(at: int) -> None:
    """Syncs the names in a directory to disk, if the filesystem supports that."""
    try:
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    except PermissionError:  # the directory may be written to, but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED | {errno.EPERM, errno.EACCES, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """Syncs a file's bytes to disk, if the filesystem supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def replace_file(name: str, content: bytes | bytearray, at: int) -> None:
    """Replaces a file's content atomically. A link of that name is replaced, not followed."""
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
    """Returns the system's description of an error, and what to do about it."""
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
