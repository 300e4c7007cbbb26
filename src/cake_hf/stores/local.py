"""A store in a directory: one safetensors file per chunk, shared by any number of processes, with no index to rebuild.

`folder` describes the files. A reader opens the file once and reads from the descriptor, so another process may delete, evict
or replace the chunk meanwhile.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.stores.base import Part, Store, refuse_longer, total_bytes
from cake_hf.stores.byte_budget import ByteBudget
from cake_hf.stores.default_budget import USUAL, FreeShare
from cake_hf.stores.direct import ALIGNMENT, read_scattered, use_page_cache, write_gathered
from cake_hf.stores.eviction import FIRST_BYTES, LRU, START_BYTES, ChunkPosition, Entry, order_named, place_in
from cake_hf.stores.folder import NOTES, SUFFIX, Folder
from cake_hf.stores.note_files import read_notes, write_note
from cake_hf.stores.safe_paths import advice, directory, sync_file
from cake_hf.stores.specs import expanded
from cake_hf.util.interrupts import is_the_users

__all__ = ["SUFFIX", "LocalStore"]

ATTEMPTS = 3

MARK_SECONDS = 60.0
"""Resolution of a chunk's time of last use: reads touch its file at most once in this time."""


class LocalStore(Store):
    """A store in a directory of the local (or a mounted) filesystem.

    A process with a budget evicts as many chunks as needed before it writes a new one (give all processes the same budget).
    The stored chunks, together with those being written, stay within the budget. A process without a budget evicts nothing,
    but its writes are counted.

    Args:
        root: the directory. If it is missing, the first write creates it, accessible to its owner alone.
        budget: most bytes of chunks in the directory, or a share of the free disk (`FreeShare`), by default a fifth; None for
            no limit. Chunks that are already there always fit a share: they are evicted only to make room for new ones, never
            to shrink the store.
        eviction: which chunk is evicted: "lru" (the chunk that was used longest ago) or "front-first" (of the prompt that was
            used longest ago, the chunk nearest to its start, which is the cheapest to compute).
        clock: gives monotonic seconds, which decide when the directory is surveyed again.

    Opening the store, and reading after `look_only`, changes nothing. Nothing is written to a directory that holds other
    files.

    Attributes:
        marks_use: whether reads count as uses.
        eviction: the order of eviction, as it was passed.
        share: the share of the free disk, if the budget is a share.

    Raises:
        StoreError: `root` is not a directory, or may not be searched; the message says what to do.
        ValueError: `budget` is not positive, or there is no such eviction.
    """

    reads_ranges = True
    range_seconds = 1e-4

    def __init__(
        self,
        root: str | os.PathLike[str],
        budget: int | FreeShare | None = USUAL,
        eviction: str = LRU,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(budget, int) and budget <= 0:
            raise ValueError(f"budget must be positive, got {budget}; pass None for no limit.")
        self.root = expanded(root).absolute()
        self.marks_use = True
        self._looks_only = False
        self._written = False
        self.eviction = eviction
        self.share = budget if isinstance(budget, FreeShare) else None
        self._folder = Folder(self.root)
        self._budget = ByteBudget(self._folder, budget, order_named(eviction, self.place), clock)
        self._check_root()

    def __repr__(self) -> str:
        budget = "" if self._budget.budget is None else f", budget={self._budget.budget}"
        eviction = "" if self.eviction == LRU else f", eviction={self.eviction!r}"
        return f"LocalStore({str(self.root)!r}{budget}{eviction})"

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._told(f"The chunks in {self.root} cannot be looked for: "):
            return [status is not None for status in self._folder.statuses(keys)]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        return self.read_gradually(key, parts, lambda count: None)

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> int | None:
        with (
            self._told(f"Chunk {key} cannot be read from {self.root}: "),
            suppress(FileNotFoundError),
            self._folder.chunk(key) as (descriptor, status),
        ):
            expected = total_bytes(parts)
            if status.st_size != expected:
                raise CorruptChunk(f"Chunk {key} has {status.st_size} bytes, {expected} were expected.")
            read_scattered(descriptor, parts, key, arrived=arrived)
            self._mark_use(descriptor, status.st_mtime)
            return expected
        return None

    def read_up_to(self, key: str, buffer: memoryview) -> int | None:
        with (
            self._told(f"Chunk {key} cannot be read from {self.root}: "),
            suppress(FileNotFoundError),
            self._folder.chunk(key) as (descriptor, status),
        ):
            size = status.st_size
            refuse_longer(key, size, buffer)
            aligned = size - size % ALIGNMENT  # only whole pages can be read directly
            read_scattered(descriptor, [buffer[:aligned]], key)
            if aligned < size:
                use_page_cache(descriptor)
                read_scattered(descriptor, [buffer[aligned:size]], key, aligned)
            self._mark_use(descriptor, status.st_mtime)
            return size
        return None

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        with (
            self._told(f"Chunk {key} cannot be read from {self.root}: "),
            suppress(FileNotFoundError),
            self._folder.chunk(key) as (descriptor, status),
        ):
            read_scattered(descriptor, parts, key, offset)
            self._mark_use(descriptor, status.st_mtime)
            return True
        return False

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        with self._told(f"Chunk {key} cannot be written to {self.root}: "):
            if not replace and self._folder.statuses([key])[0] is not None:
                return False
            for _ in range(ATTEMPTS - 1):
                # Another process may remove the directory, or sweep the file while it is closed and has no name yet; then the
                # write is tried again.
                with suppress(FileNotFoundError):
                    return self._publish(key, parts, replace)
            return self._publish(key, parts, replace)

    def delete(self, key: str) -> bool:
        with self._told(f"Chunk {key} cannot be deleted from {self.root}: "), self._budget.counting() as count:
            freed = self._folder.remove(key)
            count(-(freed or 0))
            return freed is not None

    def keys(self) -> Iterator[str]:
        return self._folder.keys()

    def size(self, key: str) -> int | None:
        with self._told(f"Chunk {key} cannot be looked at in {self.root}: "):
            status = self._folder.statuses([key])[0]
            return None if status is None else status.st_size

    def check_writable(self) -> None:
        """Tries to create a file, and removes files that killed writers have left.

        Raises:
            StoreError: the directory is read-only, the disk is full, or the directory holds other files.
        """
        try:
            with self._folder.partial_file("probe"):
                pass
        except OSError as error:
            if is_the_users(error):
                raise
            raise StoreError(
                f"Nothing can be written to the store {self.root}: {advice(error)} To only read from it, pass save=False."
            ) from error
        self._begin_to_write()

    def look_only(self) -> None:
        self._looks_only = not self._written

    def leaves_traces(self) -> bool:
        return not self._looks_only

    def identity(self) -> Hashable:
        return ("LocalStore", os.path.realpath(self.root))

    def notes_folder(self) -> Path | None:
        return self.root / NOTES

    def notes(self) -> Mapping[str, bytes]:
        with self._told(f"The notes in {self.root} cannot be read: "):
            return read_notes(self.root)

    def put_note(self, name: str, note: bytes | None) -> None:
        if not self._looks_only:
            with self._told(f"A note cannot be kept in {self.root}: "):
                write_note(self.root, name, note)

    def exists(self) -> bool:
        """Returns whether the directory exists."""
        with (
            self._told(f"The directory {self.root} cannot be looked at: "),
            suppress(FileNotFoundError),
            directory(self.root),
        ):
            return True
        return False

    def is_store(self) -> bool:
        """Returns whether the directory exists and is a store: it has the marker, or chunks, or nothing foreign in it."""
        with self._told(f"The directory {self.root} cannot be looked at: "):
            return self._folder.is_store()

    def sweep(self) -> int:
        """Removes files that killed writers left behind; returns how many. Files of living writers stay."""
        return self._folder.sweep()

    # Methods beyond the contract that eviction needs, both here and in `cake-hf gc`.

    def entries(self) -> list[Entry]:
        """Returns all chunks with their sizes and times of last use.

        Raises:
            StoreError: a directory or a file cannot be accessed.
        """
        with self._told(f"The chunks in {self.root} cannot be looked at: "):
            return list(self._folder.entries())

    def place(self, key: str) -> ChunkPosition | None:
        """Returns a chunk's position in its prompt, read from its header; None if unknown. Does not count as a use."""
        try:
            with self._folder.chunk(key) as (descriptor, _):
                return place_in(os.pread(descriptor, FIRST_BYTES, 0)) or place_in(os.pread(descriptor, START_BYTES, 0))
        except OSError:
            return None

    def evict(self, entry: Entry) -> bool:
        """Deletes a chunk unless it was used since it was listed; returns whether it is gone.

        Raises:
            StoreError: the chunk cannot be deleted.
        """
        with self._told(f"Chunk {entry.key} cannot be deleted from {self.root}: "), self._budget.counting() as count:
            count(-self._folder.discard(entry))
            return self._folder.statuses([entry.key])[0] is None

    def budget(self) -> int | None:
        """Returns the byte budget; None for no limit. A share of the free disk is converted to bytes.

        Raises:
            StoreError: the directory cannot be accessed.
        """
        with self._told(f"The chunks in {self.root} cannot be looked at: "):
            return self._budget.worked_out(sum(entry.nbytes for entry in self._folder.entries()))

    def pin(self, keys: Iterable[str], until: float) -> int:
        """Protects chunks from eviction until a date, which replaces an earlier one. `delete` still deletes them.

        Args:
            keys: the keys of chunks; keys that are not stored are skipped.
            until: seconds since the epoch.

        Returns:
            How many chunks this call has pinned.

        Raises:
            StoreError: the directory cannot be written to.
        """
        wanted = list(dict.fromkeys(keys))
        there = [key for key, has in zip(wanted, self.contains(wanted), strict=True) if has]
        with self._told(f"Chunks in {self.root} cannot be pinned: "):
            if there:
                self._budget.pin(dict.fromkeys(there, math.ceil(until)), ())
        return len(there)

    def unpin(self, keys: Iterable[str]) -> int:
        """Allows eviction of chunks again; returns how many of them were pinned. Raises like `pin`."""
        pinned = self.pinned()
        wanted = [key for key in dict.fromkeys(keys) if key in pinned]
        with self._told(f"Chunks in {self.root} cannot be unpinned: "):
            if wanted:
                self._budget.pin({}, wanted)
        return len(wanted)

    def pinned(self) -> dict[str, int]:
        """Returns the chunks that are pinned now: key -> end of the pin, in seconds since the epoch.

        Raises:
            StoreError: the directory cannot be accessed.
        """
        with self._told(f"The pins in {self.root} cannot be read: "):
            return self._budget.pinned()

    def _check_root(self) -> None:
        with self._told(f"The store directory {self.root} cannot be opened: "), suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.stat(self.root).st_mode):
                raise StoreError(f"The store path {self.root} is a file; give the path of a directory.")
            with directory(self.root) as root:
                os.stat(".", dir_fd=root)  # fails if the directory may not be searched

    def _publish(self, key: str, parts: Sequence[Part], replace: bool) -> bool:
        """Writes a partial file, makes it durable, and only then gives it the chunk's name."""
        nbytes = total_bytes(parts)
        with self._folder.partial_file(key) as partial:
            self._begin_to_write()
            self._budget.reserve(partial.descriptor, nbytes)
            named = False
            try:
                write_gathered(partial.descriptor, parts)
                sync_file(partial.descriptor)
                with self._budget.counting() as count:
                    replaced = (self.size(key) or 0) if replace else 0
                    named = self._folder.give_name(partial, key, replace=replace)
                    count(-replaced)
                if named:
                    self._folder.make_name_durable(key)
            except BaseException:
                self._budget.give_back(nbytes)
                raise
            if not named:
                self._budget.give_back(nbytes)
            return named

    def _begin_to_write(self) -> None:
        """Sweeps at the first write: only then is it known that the directory is a store, and that it is written to."""
        self._looks_only = False
        if not self._written:
            self._written = True
            self.sweep()

    def _mark_use(self, descriptor: int, used: float) -> None:
        """Records a use as the file's mtime. Unlike atime, no mount option disables it and no backup changes it by reading."""
        if self.marks_use and not self._looks_only and abs(time.time() - used) > MARK_SECONDS:
            with suppress(OSError):  # the file belongs to another user: only the owner's uses count
                os.utime(descriptor)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turns the body's OSErrors into StoreErrors: `what` starts the sentence, advice on what to do ends it."""
        try:
            yield
        except OSError as error:
            if is_the_users(error):
                raise
            raise StoreError(f"{what}{advice(error)}") from error
