"""The files of a store in a directory: where they are, how one appears, and what dead writers leave.

    <root>/3f/3fa9...e1.safetensors      a chunk; it gets its name when it is whole
    <root>/partial/3fa9...e1.<random>    a chunk being written; its writer holds a lock on it while it lives
    <root>/bytes                         how many bytes all of these have, once a process keeps a budget; may be deleted
    <root>/notes/...                     what was learnt about this store's speed; may be deleted at any time

A partial file whose lock is free belongs to a dead writer, and is swept away by whoever comes across it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cake_hf.arithmetic.errors import CorruptChunk, StoreError
from cake_hf.stores.base import Part
from cake_hf.stores.direct import is_refusal, skip_page_cache, use_page_cache
from cake_hf.stores.eviction import Entry
from cake_hf.stores.pieces import after

SUFFIX = ".safetensors"
PARTIAL = "partial"
NOTES = "notes"
BYTES = "bytes"
CACHED_STEP = 2**19
"""Bytes after which whoever checks them is told: few enough to be in the processor's cache still."""
DIRECT_STEP = 2**23
"""A disk wants larger requests."""
IOV_MAX = os.sysconf("SC_IOV_MAX")
_KEY = re.compile(r"[0-9a-f]{40}")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Folder:
    """The files below one root. Methods raise OSError as it comes; who calls them knows what was being done."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> str:
        """The file of a chunk."""
        return f"{self.root}/{key[:2]}/{key}{SUFFIX}"

    def keys(self) -> Iterator[str]:
        """All chunks that have their name.

        Raises:
            StoreError: a directory cannot be listed.
        """
        for shard in sorted(_listing(self.root)):
            if len(shard) != 2:
                continue
            for name in _listing(self.root / shard):
                stem = name.removesuffix(SUFFIX)
                if name.endswith(SUFFIX) and stem.startswith(shard) and _KEY.fullmatch(stem):
                    yield stem

    def entries(self) -> Iterator[Entry]:
        """All chunks with their sizes and last uses, as far as they are still there.

        Raises:
            StoreError: a directory cannot be listed.
        """
        for key in self.keys():
            with suppress(FileNotFoundError):
                status = os.stat(self.path(key))
                yield Entry(key, status.st_size, status.st_mtime)

    def partial_bytes(self) -> int:
        """Bytes of all files that are being written, each as large as it will be."""
        total = 0
        for name in _listing(self.root / PARTIAL):
            with suppress(FileNotFoundError):
                status = os.stat(self.root / PARTIAL / name)
                total += status.st_size if status.st_nlink == 1 else 0  # with a second name it is a chunk already
        return total

    def discard(self, entry: Entry) -> int:
        """Delete a chunk, unless it was used since it was listed; gives the bytes that are free now.

        Readers hold the file open and read on; whoever comes later finds a miss.
        """
        path = self.path(entry.key)
        try:
            status = os.stat(path)
            if status.st_mtime > entry.used:
                return 0
            os.unlink(path)
        except FileNotFoundError:
            return 0
        return status.st_size

    def sweep(self) -> int:
        """Remove what killed writers left behind; returns how many files. Files of living writers stay."""
        swept = 0
        try:
            leftovers = _listing(self.root / PARTIAL)
        except StoreError:  # Somebody else's store: it can be read all the same.
            return swept
        for name in leftovers:
            path = self.root / PARTIAL / name
            with suppress(OSError), opened(path, os.O_RDWR) as descriptor:
                if try_lock(descriptor):
                    path.unlink()
                    swept += 1
        return swept

    @contextmanager
    def partial_file(self, key: str) -> Iterator[tuple[int, str]]:
        """A new file under `partial/`, open for writing, locked as long as its writer lives, and gone from there afterwards."""
        directory = self.root / PARTIAL
        directory.mkdir(exist_ok=True)
        while True:
            path = f"{directory}/{key}.{secrets.token_hex(8)}"
            with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                # A sweep may look between our open and our lock; it has removed the file then, and we take a new one.
                if try_lock(descriptor) and os.fstat(descriptor).st_nlink:
                    try:
                        yield descriptor, path
                    finally:
                        with suppress(OSError):
                            os.unlink(path)
                    return

    def make_shard(self, key: str) -> None:
        """The directory that a chunk's file goes to, durably."""
        shard = os.path.dirname(self.path(key))
        if not os.path.isdir(shard):
            os.makedirs(shard, exist_ok=True)
            _sync_directory(str(self.root))

    def give_name(self, partial: str, key: str, *, replace: bool) -> bool:
        """Let a whole partial file be the chunk; False, and nothing is changed, where there is one and it is to stay.

        A link fails where the name is taken, so of two writers of one key only the first one succeeds. Where the filesystem has
        no links, both may, one after the other; their values are equal.

        The partial name is gone then: as long as a chunk has both, evicting it frees nothing.
        """
        final = self.path(key)
        if not replace:
            try:
                os.link(partial, final)
                os.unlink(partial)
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
            if os.path.exists(final):
                return False
        os.rename(partial, final)
        return True

    def make_name_durable(self, key: str) -> None:
        """Bring the chunk's name to the disk. Where that fails it is taken back: what is listed has to survive a crash."""
        final = self.path(key)
        try:
            _sync_directory(os.path.dirname(final))
        except OSError:
            with suppress(OSError):
                os.unlink(final)
            raise


@contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    """A descriptor while the body runs. New files get the mode that the user's umask allows."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_scattered(
    descriptor: int,
    parts: Sequence[memoryview],
    key: str,
    offset: int = 0,
    arrived: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill the parts from an offset in the file on; preadv leaves the GIL alone and copies nothing twice.

    What is not in the page cache is read past it, see `direct`.

    Args:
        descriptor: of the open file.
        parts: writable buffers.
        key: for the message.
        offset: of the first byte.
        arrived: called with how many parts are full, after each step.

    Raises:
        CorruptChunk: the file ends before the parts are full.
    """
    step = DIRECT_STEP if skip_page_cache(descriptor, parts, offset) else CACHED_STEP
    begin, nbytes = 0, 0
    for end, part in enumerate(parts, start=1):
        nbytes += part.nbytes
        if nbytes >= step or end == len(parts):
            _fill(descriptor, parts[begin:end], nbytes, key, offset)
            arrived(end)
            begin, offset, nbytes = end, offset + nbytes, 0


def _fill(descriptor: int, parts: Sequence[memoryview], nbytes: int, key: str, offset: int) -> None:
    """Fill the parts, which have that many bytes."""
    while nbytes:
        try:
            count = os.preadv(descriptor, parts[:IOV_MAX], offset)
        except OSError as error:
            if not is_refusal(error) or not use_page_cache(descriptor):
                raise
            continue
        if count == 0:
            raise CorruptChunk(f"Chunk {key} ended early.")
        offset += count
        nbytes -= count
        if nbytes:
            parts = after(parts, count)


def write_gathered(descriptor: int, parts: Sequence[Part]) -> None:
    """Write the parts one after the other, without joining them in memory."""
    pending = [view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes]
    while pending:
        pending = after(pending, os.writev(descriptor, pending[:IOV_MAX]))


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


def try_lock(descriptor: int) -> bool:
    """Take the file's lock, which the kernel gives back when the holder dies; False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listing(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"The directory {directory} cannot be listed: {advice(error)}") from error


def _sync_directory(path: str) -> None:
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)
