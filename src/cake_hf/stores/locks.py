"""Locks between processes, on an open file: the kernel gives them back when their holder dies.

A lock belongs to the open file, which a child of `fork` shares. So it is given back by name, not by closing alone, and a child
closes what it has inherited at once: otherwise it would hold its parent's locks for as long as it lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress

from cake_hf.stores.safe_paths import open_file, status_of

STALE_SECONDS = 10.0
"""After so long without a change a lock file is taken for a dead process's."""

_held: set[int] = set()
_forks = 0


class NoLocks(OSError):
    """The filesystem has no such locks."""


def take(descriptor: int) -> bool:
    """Lock an open file; False if another holds it. Given back with `give_back`.

    Raises:
        NoLocks: that is not to be had here.
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
    """Unlock an open file, whoever else has it open. It must not be closed before."""
    if descriptor in _held:
        _held.discard(descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def forks() -> int:
    """A number that changes with each fork. A file that was opened before one and locked after it is the child's, too."""
    return _forks


def _count_fork() -> None:
    global _forks
    _forks += 1


def _let_go() -> None:
    """In a child: what its parent holds is none of its own."""
    for descriptor in list(_held):
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(before=_count_fork, after_in_parent=_count_fork, after_in_child=_let_go)


class LockFile:
    """A lock where the filesystem has none on open files: a file that is there while somebody holds it.

    A holder that dies leaves it behind. So it is removed where it has not changed for long; it is never held that long.

    Args:
        name: of the file.
        at: descriptor of its directory, open as long as this object is used.
        stale_seconds: how long an unchanged one is waited for.
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
        """Make the file, unless we have; False if another has."""
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
        """Remove the file, if it is ours."""
        if self._is_ours:
            self._is_ours = False
            self._remove()

    def is_held_by_another(self) -> bool:
        """Whether another has made the file."""
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
