"""Locks between processes on open files; the kernel releases them when their holder dies.

A lock belongs to the open file description, which a child of `fork` shares. So a lock is released explicitly, not just by
closing the file, and a child closes inherited files at once: otherwise it would hold its parent's locks as long as it lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress

from cake_hf.stores.safe_paths import open_file, status_of

STALE_SECONDS = 10.0
"""Seconds without a change after which a lock file is taken for a dead process's."""

_held: set[int] = set()
_forks = 0


class NoLocks(OSError):
    """The filesystem has no locks on open files."""


def take(descriptor: int) -> bool:
    """Locks an open file; returns False if another process holds the lock. Release it with `give_back`.

    Raises:
        NoLocks: the filesystem has no such locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocks(error.errno or errno.ENOLCK, os.strerror(error.errno or errno.ENOLCK)) from error
    _held.add(descriptor)
    return True


def give_back(descriptor: int) -> None:
    """Unlocks an open file, even if another process shares it. The file must not be closed before."""
    if descriptor in _held:
        _held.discard(descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def forks() -> int:
    """Returns a number that changes with each fork. A lock on a file that was opened before a fork is also the child's."""
    return _forks


def _count_fork() -> None:
    global _forks
    _forks += 1


def _let_go() -> None:
    """Closes a forked child's copies of files that the parent has locked."""
    for descriptor in list(_held):
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(before=_count_fork, after_in_parent=_count_fork, after_in_child=_let_go)


class LockFile:
    """A lock for filesystems without locks on open files: a file that exists while a process holds the lock.

    A holder that dies leaves the file behind. So the file is removed if it has not changed for a long time; the lock is never
    held that long.

    Args:
        name: name of the file.
        at: descriptor of its directory, open as long as this object is used.
        stale_seconds: how long to wait for an unchanged file.
    """

    def __init__(self, name: str, at: int, stale_seconds: float | None = None) -> None:
        self._name = name
        self._at = at
        self._stale_seconds = STALE_SECONDS if stale_seconds is None else stale_seconds
        self._is_ours = False
        self._seen: tuple[int, int] | None = None
        self._since = 0.0

    def __enter__(self) -> LockFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def take(self) -> bool:
        """Creates the file, unless we have already; returns False if another process has."""
        if self._is_ours:
            return True
        try:
            descriptor, _ = open_file(self._name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._at)
        except FileExistsError:
            return not self.is_held_by_another() and self.take()
        os.close(descriptor)
        self._is_ours = True
        return True

    def give_back(self) -> None:
        """Removes the file, if it is ours."""
        if self._is_ours:
            self._is_ours = False
            self._remove()

    def is_held_by_another(self) -> bool:
        """Returns whether another process has created the file."""
        status = None if self._is_ours else status_of(self._name, self._at)
        seen = None if status is None else (status.st_ino, status.st_mtime_ns)
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        elif seen is not None and time.monotonic() - self._since > self._stale_seconds:
            self._remove()
            return False
        return seen is not None

    def _remove(self) -> None:
        with suppress(OSError):
            os.unlink(self._name, dir_fd=self._at)
