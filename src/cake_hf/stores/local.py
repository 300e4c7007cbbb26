"""Chunks in a directory: one safetensors file each, shared by any number of processes, with no index to rebuild.

Which files there are stands in `folder`. A reader opens the file once and reads from the descriptor, so another process may
delete, evict or replace the chunk meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cake_hf.arithmetic.errors import CorruptChunk, StoreError
from cake_hf.stores.base import Part, Store, total_bytes
from cake_hf.stores.eviction import LRU, Entry, Place, order_named
from cake_hf.stores.folder import NOTES, SUFFIX, Folder, advice, opened, read_scattered, write_gathered
from cake_hf.stores.places import START_BYTES, place_in
from cake_hf.stores.room import Room
from cake_hf.stores.specs import expanded

__all__ = ["SUFFIX", "LocalStore"]

MARK_SECONDS = 60.0
"""A chunk's last use is noted this exactly: a read touches its file at most once in so long."""


class LocalStore(Store):
    """A store in a directory of the local (or a mounted) filesystem.

    With a budget, room for a new chunk is made before it is written, by all processes that were given one (give all the same).
    Their chunks, with those that are being written, stay within it; a process that was given none evicts nothing, but what
    it writes is counted.

    Args:
        root: the directory; created when missing, then for its owner alone.
        budget: most bytes of chunks that the directory may have; None for no limit.
        eviction: who makes room: "lru" (the chunk that was used longest ago) or "front-first" (of the prompt that was used
            longest ago, the chunk nearest to its start, which is the cheapest to compute).

    Attributes:
        marks_use: whether reads count as uses. Who only looks at the chunks, to check or to list them, turns it off.

    Raises:
        StoreError: `root` cannot be a directory of chunks; the message says what to do.
        ValueError: `budget` is not positive, or there is no such eviction.
    """

    reads_ranges = True
    range_seconds = 1e-4

    def __init__(self, root: str | os.PathLike[str], budget: int | None = None, eviction: str = LRU) -> None:
        if budget is not None and budget <= 0:
            raise ValueError(f"budget must be positive, got {budget}; leave it out for no limit.")
        self.root = expanded(root).absolute()
        self.marks_use = True
        self._folder = Folder(self.root)
        self._room = Room(self._folder, budget, order_named(eviction, self.place))
        try:
            if self.root.exists() and not self.root.is_dir():
                raise StoreError(f"The store path {self.root} is a file; give the path of a directory.")
            # KV gives away its prompt. Who wants to share a directory makes it, with the mode they want.
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The store directory {self.root} cannot be made: {advice(error)}") from error
        self.sweep()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [os.path.exists(self._folder.path(key)) for key in keys]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        return self.read_gradually(key, parts, lambda count: None)

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> int | None:
        try:
            with opened(self._folder.path(key), os.O_RDONLY) as descriptor:
                status, expected = os.fstat(descriptor), total_bytes(parts)
                if status.st_size != expected:
                    raise CorruptChunk(f"Chunk {key} has {status.st_size} bytes, {expected} were expected.")
                read_scattered(descriptor, parts, key, arrived=arrived)
                self._mark_use(descriptor, status.st_mtime)
                return expected
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be read from {self.root}: {advice(error)}") from error

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        try:
            with opened(self._folder.path(key), os.O_RDONLY) as descriptor:
                read_scattered(descriptor, parts, key, offset)
                self._mark_use(descriptor, os.fstat(descriptor).st_mtime)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be read from {self.root}: {advice(error)}") from error
        return True

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        if not replace and os.path.exists(self._folder.path(key)):
            return False
        try:
            return self._publish(key, parts, replace)
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be written to {self.root}: {advice(error)}") from error

    def delete(self, key: str) -> bool:
        path = self._folder.path(key)
        try:
            with self._room.counting() as count:
                nbytes = os.stat(path).st_size
                os.unlink(path)
                count(-nbytes)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be deleted from {self.root}: {advice(error)}") from error
        return True

    def keys(self) -> Iterator[str]:
        return self._folder.keys()

    def size(self, key: str) -> int | None:
        try:
            return os.stat(self._folder.path(key)).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"Chunk {key} cannot be looked at in {self.root}: {advice(error)}") from error

    def check_writable(self) -> None:
        """Try to make a file.

        Raises:
            StoreError: the directory is read-only or the disk is full.
        """
        try:
            with self._folder.partial_file("probe"):
                pass
        except OSError as error:
            raise StoreError(
                f"Nothing can be written to the store {self.root}: {advice(error)} To only read from it, pass save=False."
            ) from error

    def identity(self) -> Hashable:
        return ("LocalStore", os.path.realpath(self.root))

    def notes_folder(self) -> Path:
        return self.root / NOTES

    def sweep(self) -> int:
        """Remove what killed writers left behind; returns how many files. Files of living writers stay."""
        return self._folder.sweep()

    # What eviction, ours and that of `cake-hf gc`, needs beyond the contract.

    def entries(self) -> list[Entry]:
        """All chunks with their sizes and last uses.

        Raises:
            StoreError: a directory or a file cannot be looked at.
        """
        try:
            return list(self._folder.entries())
        except OSError as error:
            raise StoreError(f"The chunks in {self.root} cannot be looked at: {advice(error)}") from error

    def place(self, key: str) -> Place | None:
        """Where a chunk stands in its prompt, by its header; None where that cannot be told. Does not count as a use."""
        start = bytearray(START_BYTES)
        try:
            with opened(self._folder.path(key), os.O_RDONLY) as descriptor:
                count = os.preadv(descriptor, [start], 0)
        except OSError:
            return None
        return place_in(bytes(start[:count]))

    def evict(self, entry: Entry) -> bool:
        """Delete a chunk unless it was used since it was listed; whether it is gone.

        Raises:
            StoreError: it cannot be deleted.
        """
        try:
            with self._room.counting() as count:
                count(-self._folder.discard(entry))
                return not os.path.exists(self._folder.path(entry.key))
        except OSError as error:
            raise StoreError(f"Chunk {entry.key} cannot be deleted from {self.root}: {advice(error)}") from error

    def _publish(self, key: str, parts: Sequence[Part], replace: bool) -> bool:
        """Write to a partial sibling, make it durable, and only then give it its name."""
        nbytes = total_bytes(parts)
        with self._folder.partial_file(key) as (descriptor, partial):
            self._room.reserve(descriptor, nbytes)
            named = False
            try:
                write_gathered(descriptor, parts)
                os.fsync(descriptor)
                self._folder.make_shard(key)
                with self._room.counting() as count:
                    replaced = (self.size(key) or 0) if replace else 0
                    named = self._folder.give_name(partial, key, replace=replace)
                    count(-replaced)
                if named:
                    self._folder.make_name_durable(key)
            except BaseException:
                self._room.give_back(nbytes)
                raise
            if not named:
                self._room.give_back(nbytes)
            return named

    def _mark_use(self, descriptor: int, used: float) -> None:
        """Note a use as the file's mtime: unlike atime, no mount turns it off and no backup that reads the file changes it."""
        if self.marks_use and time.time() - used > MARK_SECONDS:
            with suppress(OSError):  # somebody else's file: its owner's uses count
                os.utime(descriptor)
