"""The byte count of a directory: one number in a small file, changed under a lock that all processes share.

The number is a cache; the directory itself is authoritative. It errs on the safe side, since bytes are counted before they are
written and until after they are deleted: a process that is killed in between leaves a number that is too large, and a process
that needs room surveys the directory before it concludes that there is none.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from cake_hf.errors import StoreError
from cake_hf.stores import locks
from cake_hf.stores.marker import LOCK
from cake_hf.stores.safe_paths import directory, is_named, open_file, replace_file, status_of, what_is

PATIENCE = 30.0
"""Seconds to wait for the lock. It is held only briefly, unless its holder is stopped."""

_PAUSE = 0.002
_DIGITS = 20


class OpenCount:
    """The byte count, while the lock is held.

    Attributes:
        total: bytes; None if the file has no number (yet).
    """

    def __init__(self, descriptor: int, replace: Callable[[bytes], None]) -> None:
        self._descriptor = descriptor
        self._replace = replace
        text = os.pread(descriptor, _DIGITS, 0)
        self.total = int(text) if len(text) == _DIGITS and text.isdigit() else None

    def set(self, total: int) -> int:
        """Replaces the number and returns it. A write of a few bytes is atomic even if the process is killed."""
        text = b"%0*d\n" % (_DIGITS, total)
        try:
            os.pwrite(self._descriptor, text, 0)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            self._replace(text)
        self.total = total
        return total

    def add(self, nbytes: int) -> int:
        """Adds bytes to the number and returns the sum. An unknown number stays unknown, and 0 is returned."""
        return 0 if self.total is None else self.set(max(0, self.total + nbytes))


class ByteCount:
    """The file with the byte count. The first process with a budget creates it; from then on all writers update it."""

    def __init__(self, file: Path, patience: float = PATIENCE) -> None:
        self._file = file
        self._patience = patience

    @contextmanager
    def opened(self, *, create: bool = False) -> Iterator[OpenCount | None]:
        """Locks the file and yields the byte count; None if there is no file and `create` is not set.

        Raises:
            StoreError: another process holds the lock for too long, or something other than a plain file has the name.
            OSError: the file cannot be opened.
        """
        with ExitStack() as held:
            try:
                folder = held.enter_context(directory(self._file.parent))
                file = held.enter_context(locks.LockFile(LOCK, folder))
                descriptor = self._locked(folder, file, create, held)
            except FileNotFoundError:
                if create:
                    raise
                yield None
                return
            yield OpenCount(descriptor, partial(self._replace, folder, file))

    def _locked(self, folder: int, file: locks.LockFile, create: bool, held: ExitStack) -> int:
        """Returns a descriptor of the file, locked until `held` is closed."""
        deadline = time.monotonic() + self._patience
        while True:
            with ExitStack() as attempt:
                forks = locks.forks()
                descriptor, in_place = self._open(folder, create)
                attempt.callback(_close, descriptor)
                while not self._take(descriptor if in_place else None, file, attempt):
                    if time.monotonic() > deadline:
                        raise self._late()
                    time.sleep(_PAUSE)
                # The file may be deleted at any time. A lock on a file without a name excludes no other process.
                if forks == locks.forks() and self._is_ours_alone(descriptor, folder):
                    held.push(attempt.pop_all())
                    return descriptor
            if time.monotonic() > deadline:
                raise self._late()

    def _take(self, descriptor: int | None, file: locks.LockFile, held: ExitStack) -> bool:
        """Takes the file's own lock, or the lock file if files have no locks; fails while another process holds either."""
        if descriptor is None:
            return file.take()
        try:
            if not locks.take(descriptor):
                return False
        except locks.NoLocks:
            return file.take()
        held.callback(locks.give_back, descriptor)
        return not file.is_held_by_another()

    def _replace(self, folder: int, file: locks.LockFile, text: bytes) -> None:
        """Replaces the file by a new one, on filesystems where a file is written only once (mounts of object storage).

        Other processes could lock the new file while we still hold the old one, so the lock file excludes them from here on.
        """
        deadline = time.monotonic() + self._patience
        while not file.take():
            if time.monotonic() > deadline:
                raise self._late()
            time.sleep(_PAUSE)
        replace_file(self._file.name, text, folder)

    def _open(self, folder: int, create: bool) -> tuple[int, bool]:
        """Opens the file, at least for reading; returns its descriptor and whether it can be written in place."""
        name = self._file.name
        if create and what_is(name, folder) is None:
            self._make(folder)
        try:
            return self._open_to_write(folder), True
        except OSError as error:
            if status_of(name, folder) is not None and error.errno != errno.EACCES:
                return open_file(name, os.O_RDONLY, folder)[0], False
            if create and what_is(name, folder) is not None:
                raise StoreError(
                    f"{self._file} is no plain file, and a store needs one of that name; remove it."
                ) from error
            raise

    def _make(self, folder: int) -> None:
        """Creates an empty file and closes it at once. On write-once filesystems it can then only be replaced."""
        with suppress(FileExistsError):
            os.close(open_file(self._file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder)[0])

    def _open_to_write(self, folder: int) -> int:
        descriptor = open_file(self._file.name, os.O_RDWR, folder)[0]
        try:
            os.pread(descriptor, 1, 0)  # some filesystems refuse reads from such a descriptor
        except OSError:
            _close(descriptor)
            raise
        return descriptor

    def _is_ours_alone(self, descriptor: int, folder: int) -> bool:
        """Returns whether the file may be written to. A file with a second name is not ours alone and loses its name here."""
        name = self._file.name
        if not is_named(name, folder, descriptor):
            return False
        if os.fstat(descriptor).st_nlink < 2:
            return True
        named, status = status_of(name, folder), os.fstat(descriptor)
        if named is not None and (named.st_dev, named.st_ino) == (status.st_dev, status.st_ino):
            os.unlink(name, dir_fd=folder)
        return False

    def _late(self) -> StoreError:
        return StoreError(
            f"Another process has held the lock on {self._file} for {self._patience:g} s; if it is stopped, let it "
            "go on or end it."
        )


def _close(descriptor: int) -> None:
    """Closes a file, ignoring errors: its content is already written, or has been written to another file."""
    with suppress(OSError):
        os.close(descriptor)
