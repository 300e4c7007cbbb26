"""The contract that every store keeps. `cake_hf.testing.StoreContract` expresses it as tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cake_hf.errors import CorruptChunk, StoreError, is_a_fault
from cake_hf.stores.pieces import Part, copy

__all__ = ["MAX_NOTE_BYTES", "MOST_NOTES", "Part", "Store", "place_of", "refuse_longer", "scatter", "total_bytes"]


MAX_NOTE_BYTES = 2**19
MOST_NOTES = 64
"""Limits on the notes that are read: bytes of one note, and the number of notes; see `Store.notes`."""

ATTEMPTS = 3
"""Attempts to read a value that is replaced by one of another size meanwhile."""


class Store(ABC):
    """A mapping from keys to byte values. A store knows nothing about tensors: only the codec knows what a value means.

    The contract:

    * A key is 40 lower-case hexadecimal digits. Equal keys mean equal KV, in one of two forms, so a value is never updated in
      part, and may be replaced as a whole.
    * All methods may be called from many threads, and many processes may open the same place.
    * A value that is listed is complete: it appears whole or not at all, even if a writer dies at any moment.
    * A miss is `None` or `False`, never an exception. A fault is a `StoreError` that says what to do.
    * Buffers are filled and read in place; a store keeps no reference to them.

    Attributes:
        reads_ranges: whether `read_range` reads no more than the range. If not, it should not be called often.
        range_seconds: approximate time that reading a range takes beyond its share of the value.
        read_only: whether nothing can ever be written here: `write`, `delete` and `check_writable` raise a StoreError, and a
            cache does not try to save. `cake_hf.testing.ReadOnlyContract` has the tests for such a store.
        in_memory: whether values are in the memory of this process, so that reading them is copying.
        counts_hits: whether prompts are counted in the notes; False if they are not a user's prompts.
    """

    reads_ranges: bool = False
    range_seconds: float = 0.0
    read_only: bool = False
    in_memory: bool = False
    counts_hits: bool = True

    @abstractmethod
    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Returns a mask that says for each key whether it is stored; any chunk of a prompt may be missing."""

    @abstractmethod
    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        """Fills the writable byte buffers, in order, with the value.

        Returns:
            The value's size in bytes, or None for a miss.

        Raises:
            CorruptChunk: the value is not exactly as long as all buffers together (their content is then undefined).
            StoreError: the value cannot be read.
        """

    @abstractmethod
    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        """Stores the joined parts durably: once this returns, the value survives a crash of the process or the machine.

        Returns:
            False if the key was already stored and `replace` is not set; nothing was written then.

        Raises:
            StoreError: the value cannot be written; the key is not listed then.
        """

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Removes a key; returns False if it was not stored.

        Raises:
            StoreError: the value cannot be removed.
        """

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """Iterates over all keys, in any order. Keys written or deleted meanwhile may or may not appear."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Returns a value's size in bytes, or None for a miss."""

    def read(self, key: str) -> bytearray | None:
        """Returns the whole value, or None for a miss.

        Raises:
            StoreError: the value cannot be read.
        """
        size = self.size(key)
        if size is None:
            return None
        value = bytearray(size)
        return None if self.read_into(key, [memoryview(value)]) is None else value

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        """Fills the writable byte buffers, in order, with the value's bytes from `offset` on.

        The default implementation reads the whole value.

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

    def read_up_to(self, key: str, buffer: memoryview) -> int | None:
        """Fills the start of a writable byte buffer with a value of unknown size.

        The default implementation asks for the size and reads the value then.

        Returns:
            The value's size in bytes, or None for a miss.

        Raises:
            CorruptChunk: the value is longer than the buffer (whose content is then undefined).
            StoreError: the value cannot be read.
        """
        for _ in range(ATTEMPTS):
            size = self.size(key)
            if size is None:
                return None
            refuse_longer(key, size, buffer)
            try:
                return self.read_into(key, [buffer[:size]])
            except CorruptChunk:
                if self.size(key) == size:
                    raise
        raise StoreError(f"Chunk {key} was replaced {ATTEMPTS} times while it was read; try again.")

    def head(self, key: str, nbytes: int) -> bytes | None:
        """Returns the first `nbytes` of a value, which must be at least that long; None for a miss.

        Raises like `read_range`.
        """
        found = bytearray(nbytes)
        return bytes(found) if self.read_range(key, [memoryview(found)], 0) else None

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> int | None:
        """Reads like `read_into`, and calls `arrived(n)` whenever the first n parts are filled; by default once, at the end.

        This lets the caller check bytes while they are still in the processor's cache. An error raised by `arrived` ends
        the read.
        """
        count = self.read_into(key, parts)
        if count is not None:
            arrived(len(parts))
        return count

    def check_writable(self) -> None:
        """Raises a StoreError that says what to do if nothing can be written here. Does nothing by default."""

    def look_only(self) -> None:
        """Marks the store as opened for reading: until something is written, reads leave no trace in it (no time of last
        use, no notes). Does nothing by default, since reads leave no trace."""

    def leaves_traces(self) -> bool:
        """Returns whether notes may be written to `notes_folder`."""
        return True

    def mismatch_reason(self, namespace: str, metadata: Callable[[], Mapping[str, Any]]) -> str:
        """Returns the mismatch reason: a clause that tells people why nothing in this store can serve a namespace.

        The clause is empty if something in the store may serve it. Called when nothing of a prompt was found; never raises
        and never waits. By default a store does not know how its values were made.

        Args:
            namespace: digest that the keys were made with.
            metadata: returns the metadata that `namespace` is a digest of, without the salt.
        """
        return ""

    def notes_folder(self) -> Path | None:
        """Returns a folder on this machine for small files about this store (it may not exist yet), or None."""
        return None

    def notes(self) -> Mapping[str, bytes]:
        """Returns the notes kept by `put_note`, by name.

        Notes of implausible size are left out, since anyone who can write to the store can change them. By default a store
        keeps no notes.

        Raises:
            StoreError: the notes cannot be read.
        """
        return {}

    def put_note(self, name: str, note: bytes | None) -> None:
        """Keeps a note about the stored values, replacing the note of that name; None removes it.

        Notes are not values: `keys` does not list them, and only texts for people depend on them. By default nothing is kept.

        Args:
            name: 40 lower-case hexadecimal digits.
            note: at most `MAX_NOTE_BYTES`.

        Raises:
            StoreError: the note cannot be kept.
        """

    def identity(self) -> Hashable:
        """Returns a value that is equal for two store objects of this process that hold the same values.

        By default each object differs from all others.
        """
        return (type(self).__name__, id(self))

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all writes are complete; returns False if `timeout` seconds were not enough.

        By default there is nothing to wait for, since `write` returns only when it is done.
        """
        return True

    def close(self) -> None:
        """Releases everything that the store holds open. May be called twice."""

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def total_bytes(parts: Sequence[Part]) -> int:
    """Returns the size of all parts together, in bytes."""
    return sum([memoryview(part).nbytes for part in parts])


def refuse_longer(key: str, size: int, buffer: memoryview) -> None:
    """Refuses a value that does not fit a buffer.

    Raises:
        CorruptChunk: it has more bytes.
    """
    if size > buffer.nbytes:
        raise CorruptChunk(f"Chunk {key} has {size} bytes, at most {buffer.nbytes} were expected.")


def scatter(source: memoryview, parts: Sequence[memoryview], key: str) -> None:
    """Copies the start of a value's bytes into the parts, in order.

    Raises:
        CorruptChunk: the value has too few bytes.
    """
    offset = 0
    for part in parts:
        piece = source[offset : offset + part.nbytes]
        if piece.nbytes != part.nbytes:
            raise CorruptChunk(f"Chunk {key} ended early.")
        copy(part, piece)
        offset += part.nbytes


def place_of(store: Store) -> Hashable:
    """Returns a store's identity, or that of the store object if the store's own cannot be used.

    May ask a file system, which may hang.

    Raises:
        BaseException: a user's interrupt, in the main thread.
    """
    try:
        identity = store.identity()
        hash(identity)
    except BaseException as error:
        if not is_a_fault(error):
            raise
        return (type(store).__name__, id(store))
    return identity
