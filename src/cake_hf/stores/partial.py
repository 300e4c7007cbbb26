"""Partial files: how they are created, how they get their final name, and how those of dead writers are recognized."""

from __future__ import annotations

import errno
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass

from cake_hf.stores import locks
from cake_hf.stores.safe_paths import is_named, open_file, opened, status_of

LEFTOVER_SECONDS = 3600.0
"""Without file locks, a partial file that was not written to for so long is a dead writer's."""

being_written: set[str] = set()
"""Partial files of this process. Some mounts of object storage break if a file is opened again while it is being written."""

os.register_at_fork(after_in_child=being_written.clear)


@dataclass
class Partial:
    """A file that is being written.

    Attributes:
        name: the file's name in `partial/`.
        descriptor: descriptor open for writing; -1 once it is closed.
        folder: descriptor of `partial/`.
        root: descriptor of the store's directory.
    """

    name: str
    descriptor: int
    folder: int
    root: int

    def close(self) -> None:
        """Releases the lock and closes the file."""
        if self.descriptor >= 0:
            locks.give_back(self.descriptor)
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)


def new_file(key: str, folder: int, root: int) -> Partial:
    while True:
        name, forks = f"{key}.{secrets.token_hex(8)}", locks.forks()
        partial = Partial(name, open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder)[0], folder, root)
        try:
            # A sweep between our open and our lock removes the file; then we create a new one.
            if _is_free(partial.descriptor) and is_named(name, folder, partial.descriptor) and forks == locks.forks():
                return partial
        except BaseException:
            partial.close()
            raise
        partial.close()
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)


def _is_free(descriptor: int) -> bool:
    """Takes the file's lock; returns True also if the filesystem has no locks."""
    try:
        return locks.take(descriptor)
    except locks.NoLocks:
        return True


def remove_if_left(name: str, folder: int) -> bool:
    """Removes a partial file if its writer is dead; returns whether it was removed."""
    try:
        return _remove_if_free(name, folder, os.O_RDONLY)
    except locks.NoLocks as error:
        if error.errno == errno.EBADF:
            # NFS locks only files open for writing. Not tried elsewhere: such an open harms files on write-once filesystems.
            with suppress(locks.NoLocks):
                return _remove_if_free(name, folder, os.O_RDWR)
    status = status_of(name, folder)
    if status is None or time.time() - status.st_mtime < LEFTOVER_SECONDS:
        return False
    os.unlink(name, dir_fd=folder)
    return True


def _remove_if_free(name: str, folder: int, flags: int) -> bool:
    with opened(name, flags, folder) as (descriptor, _):
        if not locks.take(descriptor):
            return False
        try:
            os.unlink(name, dir_fd=folder)
        finally:
            locks.give_back(descriptor)
        return True


def link(partial: Partial, name: str, shard: int) -> bool:
    """Gives a file its final name by a link and removes the partial one; returns False if the name is taken or links fail."""
    try:
        os.link(partial.name, name, src_dir_fd=partial.folder, dst_dir_fd=shard, follow_symlinks=False)
    except OSError:  # the rename that follows reports any real fault
        return False
    with suppress(OSError):
        os.unlink(partial.name, dir_fd=partial.folder)
    return True
