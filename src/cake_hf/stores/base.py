"""The contract that every store keeps. `cake_hf.testing.StoreContract` is the same text as tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cake_hf.errors import CorruptChunk, is_a_fault
from cake_hf.stores.pieces import Part, copy

__all__ = ["MAX_NOTE_BYTES", "MOST_NOTES", "Part", "Store", "place_of", "scatter", "total_bytes"]


MAX_NOTE_BYTES = 2**19
MOST_NOTES = 64
"""Notes, and bytes of one, that are read; see `Store.notes`."""


class Store(ABC):
    """Keyed values of bytes. A store knows nothing about tensors: only the codec knows what a value means.

    The contract:

    * A key is 40 lower-case hexadecimal digits; equal keys mean equal values, so a value is never updated in part.
    * All methods may be called from many threads, and the same place may be opened by many processes.
    * A value that can be listed is complete: it appears whole or not at all, even if a writer dies at any moment.
    * A miss is `None` or `False`, never an exception. A fault is a `StoreError` that says what to do.
    * Buffers are filled and read as they are; a store keeps no reference to them.

    Attributes:
        reads_ranges: whether `read_range` reads no more than the range. If not, it should not be called often.
        range_seconds: roughly the time that reading a range takes beyond its share of the value.
        read_only: nothing can ever be written here: `write`, `delete` and `check_writable` raise a StoreError, and a cache
            does not try to save. `cake_hf.testing.ReadOnlyContract` has the tests of such a store.
        counts_hits: whether prompts are counted among the notes; False if they are not a user's prompts.
    """

    reads_ranges: bool = False
    range_seconds: float = 0.0
    read_only: bool = False
    counts_hits: bool = True

    @abstractmethod
    def contains(self, keys: Sequence[str]) -> list[bool]:
        """For each key, whether it is stored; a mask, since any chunk of a prompt may be missing."""

    @abstractmethod
    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        """Fill the writable byte buffers, in order, with the value.

        Returns:
            The value's bytes, or None for a miss.

        Raises:
            CorruptChunk: the value is not exactly as long as the buffers together (their content is then undefined).
            StoreError: the value cannot be read.
        """

    @abstractmethod
    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        """Store the joined parts durably: once this returns, the value survives a crash of the process or the machine.

        Returns:
            False if the key was there and `replace` is not set; then nothing was written.

        Raises:
            StoreError: the value cannot be written; the key is not listed then.
        """

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Remove a key; False if it was not there.

        Raises:
            StoreError: the value cannot be removed.
        """

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """All keys, in any order. Keys written or deleted meanwhile may or may not appear."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of a value, or None for a miss."""

    def read(self, key: str) -> bytearray | None:
        """The whole value, or None for a miss.

        Raises:
            StoreError: the value cannot be read.
        """
        size = self.size(key)
        if size is None:
            return None
        value = bytearray(size)
        return None if self.read_into(key, [memoryview(value)]) is None else value

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        """Fill the writable byte buffers, in order, with the value's bytes from `offset` on. By default the whole is read.

        Returns:
            False for a miss.

        Raises:
            CorruptChunk: the value ends before the buffers are full (their content is then undefined).
            StoreError: the value cannot be read.
        """
        value = self.read(key)
        if value is not None:
            scatter(memoryview(value)[offset:], parts, key)
        return value is not None

    def head(self, key: str, nbytes: int) -> bytes | None:
        """The first bytes of a value, which must be at least that long; None for a miss. Raises like `read_range`."""
        found = bytearray(nbytes)
        return bytes(found) if self.read_range(key, [memoryview(found)], 0) else None

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> int | None:
        """Like `read_into`, but calls `arrived(n)` whenever the first n parts are there; by default once, with all of them.

        Bytes are best checked while they are in the processor's cache. An error raised by `arrived` ends the read.
        """
        count = self.read_into(key, parts)
        if count is not None:
            arrived(len(parts))
        return count

    def check_writable(self) -> None:
        """Raise a StoreError that says what to do if nothing can be written here. Does nothing by default."""

    def look_only(self) -> None:
        """The store was opened for reading: until something is written, reading leaves no trace in it (no time of
        last use, no notes). Does nothing by default, since reads leave none."""

    def leaves_traces(self) -> bool:
        """Whether notes may be written to `notes_folder`."""
        return True

    def mismatch_reason(self, namespace: str, facts: Callable[[], Mapping[str, Any]]) -> str:
        """A clause for people that says why nothing in this store can serve a namespace; empty if something may.

        Called when nothing of a prompt was found; never raises and never waits. By default a store does not know how its
        values were made.

        Args:
            namespace: digest that the keys were made with.
            facts: returns the facts that it is a digest of, without the salt.
        """
        return ""

    def notes_folder(self) -> Path | None:
        """A folder on this machine for small files about this store (it may not exist yet), or None."""
        return None

    def notes(self) -> Mapping[str, bytes]:
        """The notes kept by `put_note`, by name, without absurd ones: anyone who can write to the store can change notes.

        By default a store keeps none.

        Raises:
            StoreError: they cannot be read.
        """
        return {}

    def put_note(self, name: str, note: bytes | None) -> None:
        """Keep a note about the stored values, replacing the note of that name; None removes it.

        Notes are not values: `keys` does not list them, and only texts for people depend on them. By default nothing is kept.

        Args:
            name: 40 lower-case hexadecimal digits.
            note: at most `MAX_NOTE_BYTES`.

        Raises:
            StoreError: it cannot be kept.
        """

    def identity(self) -> Hashable:
        """Equal for two store objects of this process with the same values. By default each object differs from all others."""
        return (type(self).__name__, id(self))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all writes are complete; returns False if `timeout` seconds were not enough.

        By default `write` leaves nothing to wait for.
        """
        return True

    def close(self) -> None:
        """Release what the store holds open. May be called twice."""

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def total_bytes(parts: Sequence[Part]) -> int:
    """Bytes of all parts together."""
    return sum([memoryview(part).nbytes for part in parts])


def scatter(source: memoryview, parts: Sequence[memoryview], key: str) -> None:
    """Copy the start of a value's bytes into the parts, in order.

    Raises:
        CorruptChunk: there are not enough of them.
    """
    offset = 0
    for part in parts:
        piece = source[offset : offset + part.nbytes]
        if piece.nbytes != part.nbytes:
            raise CorruptChunk(f"Chunk {key} ended early.")
        copy(part, piece)
        offset += part.nbytes


def place_of(store: Store) -> Hashable:
    """A store's identity, or the store object's own where it has none that can be used. May ask a file system, which may hang.

    Raises:
        BaseException: in the main thread, the user's interrupts.
    """
    try:
        identity = store.identity()
        hash(identity)
    except BaseException as error:
        if not is_a_fault(error):
            raise
        return (type(store).__name__, id(store))
    return identity
