"""Files that are being written: how one begins, how it gets its name, and how a dead writer's is told from a living one's."""

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
"""Where files cannot be locked, one that was not written to for so long is a dead writer's."""

being_written: set[str] = set()
"""Partial files of this process. Some mounts of object storage do not bear that a file is opened twice while it is written."""

os.register_at_fork(after_in_child=being_written.clear)


@dataclass
class Partial:
    """A file that is being written.

    Attributes:
        name: of it, in `partial/`.
        descriptor: open for writing; -1 once it is closed.
        folder: descriptor of `partial/`.
        root: descriptor of the store's directory.
    """

    name: str
    descriptor: int
    folder: int
    root: int

    def close(self) -> None:
        """Close it, and with it give its lock back."""
        if self.descriptor >= 0:
            locks.give_back(self.descriptor)
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)


def new_file(key: str, folder: int, root: int) -> Partial:
    while True:
        name, forks = f"{key}.{secrets.token_hex(8)}", locks.forks()
        partial = Partial(name, open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder)[0], folder, root)
        try:
            # A sweep may look between our open and our lock; it has removed the file then, and we take a new one.
            if _is_free(partial.descriptor) and is_named(name, folder, partial.descriptor) and forks == locks.forks():
                return partial
        except BaseException:
            partial.close()
            raise
        partial.close()
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)


def _is_free(descriptor: int) -> bool:
    """Take the file's lock, if it has one."""
    try:
        return locks.take(descriptor)
    except locks.NoLocks:
        return True


def remove_if_left(name: str, folder: int) -> bool:
    """Remove a partial file if its writer is dead."""
    try:
        return _remove_if_free(name, folder, os.O_RDONLY)
    except locks.NoLocks as error:
        if (
            error.errno == errno.EBADF
        ):  # NFS locks only what is open for writing; where files are written once, that does harm
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
    """Give a file its second name, and take the first; False where the name is taken, or there are no links."""
    try:
        os.link(partial.name, name, src_dir_fd=partial.folder, dst_dir_fd=shard, follow_symlinks=False)
    except OSError:  # if nothing works here, the rename that follows says why
        return False
    with suppress(OSError):
        os.unlink(partial.name, dir_fd=partial.folder)
    return True
