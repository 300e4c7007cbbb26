"""Chunks in a directory: one safetensors file each, shared by any number of processes, with no index to rebuild.

    <root>/3f/3fa9...e1.safetensors      a chunk; it appears by rename, so it is whole or not there
    <root>/partial/3fa9...e1.<random>    a chunk being written; its writer holds a lock on it while it lives
    <root>/notes/...                     what was learnt about this store's speed; may be deleted at any time

A partial file whose lock is free belongs to a dead writer. Opening the store sweeps those away. A reader opens the file
once and reads from the descriptor, so another process may delete or replace the chunk meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cake_hf.arithmetic.errors import CorruptChunk, StoreError
from cake_hf.stores.base import Part, Store, total_bytes

SUFFIX = ".safetensors"
PARTIAL = "partial"
NOTES = "notes"
IOV_MAX = os.sysconf("SC_IOV_MAX")
_KEY = re.compile(r"[0-9a-f]{40}")


class LocalStore(Store):
    """A store in a directory of the local (or a mounted) filesystem.

    Args:
        root: the directory; created when missing.

    Raises:
        StoreError: `root` cannot be a directory of chunks; the message says what to do.
    """

    reads_ranges = True
    range_seconds = 1e-4

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        try:
            if self.root.exists() and not self.root.is_dir():
                raise StoreError(f"The store path {self.root} is a file; give the path of a directory.")
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The store directory {self.root} cannot be made: {_advice(error)}") from error
        self.sweep()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [os.path.exists(self._path(key)) for key in keys]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        try:
            with _opened(self._path(key), os.O_RDONLY) as descriptor:
                size, expected = os.fstat(descriptor).st_size, total_bytes(parts)
                if size != expected:
                    raise CorruptChunk(f"Chunk {key} has {size} bytes, {expected} were expected.")
                _read_scattered(descriptor, parts, key)
                return size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be read from {self.root}: {_advice(error)}") from error

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        try:
            with _opened(self._path(key), os.O_RDONLY) as descriptor:
                _read_scattered(descriptor, parts, key, offset)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be read from {self.root}: {_advice(error)}") from error
        return True

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        final = self._path(key)
        if not replace and os.path.exists(final):
            return False
        try:
            self._publish(key, final, parts)
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be written to {self.root}: {_advice(error)}") from error
        return True

    def delete(self, key: str) -> bool:
        try:
            os.unlink(self._path(key))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be deleted from {self.root}: {_advice(error)}") from error
        return True

    def keys(self) -> Iterator[str]:
        for shard in sorted(_listing(self.root)):
            if len(shard) != 2:
                continue
            for name in _listing(self.root / shard):
                stem = name.removesuffix(SUFFIX)
                if name.endswith(SUFFIX) and stem.startswith(shard) and _KEY.fullmatch(stem):
                    yield stem

    def size(self, key: str) -> int | None:
        try:
            return os.stat(self._path(key)).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be looked at in {self.root}: {_advice(error)}") from error

    def check_writable(self) -> None:
        """Try to make a file.

        Raises:
            StoreError: the directory is read-only or the disk is full.
        """
        try:
            with self._partial_file("probe") as (_, path):
                os.unlink(path)
        except OSError as error:
            raise StoreError(
                f"Nothing can be written to the store {self.root}: {_advice(error)} "
                "To only read from it, pass save=False."
            ) from error

    def identity(self) -> Hashable:
        return ("LocalStore", os.path.realpath(self.root))

    def notes_folder(self) -> Path:
        return self.root / NOTES

    def sweep(self) -> int:
        """Remove what killed writers left behind; returns how many files. Files of living writers stay."""
        swept = 0
        try:
            leftovers = _listing(self.root / PARTIAL)
        except StoreError:  # Somebody else's store: it can be read all the same.
            return swept
        for name in leftovers:
            path = self.root / PARTIAL / name
            with suppress(OSError), _opened(path, os.O_RDWR) as descriptor:
                if _try_lock(descriptor):
                    path.unlink()
                    swept += 1
        return swept

    def _path(self, key: str) -> str:
        return f"{self.root}/{key[:2]}/{key}{SUFFIX}"

    def _publish(self, key: str, final: str, parts: Sequence[Part]) -> None:
        """Write to a partial sibling, make it durable, and only then give it its name."""
        with self._partial_file(key) as (descriptor, partial):
            try:
                _write_gathered(descriptor, parts)
                os.fsync(descriptor)
                shard = os.path.dirname(final)
                if not os.path.isdir(shard):
                    os.makedirs(shard, exist_ok=True)
                    _sync_directory(str(self.root))
                os.rename(partial, final)
                _sync_directory(shard)
            except BaseException:
                with suppress(OSError):
                    os.unlink(partial)
                raise

    @contextmanager
    def _partial_file(self, key: str) -> Iterator[tuple[int, str]]:
        """A new file under `partial/`, open for writing and locked as long as its writer lives."""
        directory = self.root / PARTIAL
        directory.mkdir(exist_ok=True)
        while True:
            path = f"{directory}/{key}.{secrets.token_hex(8)}"
            with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                # A sweep may look between our open and our lock; it has removed the file then, and we take a new one.
                if _try_lock(descriptor) and os.fstat(descriptor).st_nlink:
                    yield descriptor, path
                    return


@contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Take the file's lock, which the kernel gives back when the holder dies; False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_scattered(descriptor: int, parts: Sequence[memoryview], key: str, offset: int = 0) -> None:
    """Fill the parts from an offset in the file on; preadv leaves the GIL alone and copies nothing twice."""
    pending = [part for part in parts if part.nbytes]
    while pending:
        count = os.preadv(descriptor, pending[:IOV_MAX], offset)
        if count == 0:
            raise CorruptChunk(f"Chunk {key} ended early.")
        offset += count
        pending = _after(pending, count)


def _write_gathered(descriptor: int, parts: Sequence[Part]) -> None:
    pending = [view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes]
    while pending:
        pending = _after(pending, os.writev(descriptor, pending[:IOV_MAX]))


def _after(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the parts once their first `count` bytes are done."""
    for position, part in enumerate(parts):
        if count < part.nbytes:
            return [part[count:], *parts[position + 1 :]]
        count -= part.nbytes
    return []


def _listing(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"The directory {directory} cannot be listed: {_advice(error)}") from error


def _sync_directory(path: str) -> None:
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def _advice(error: OSError) -> str:
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
