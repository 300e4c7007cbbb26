"""The contract that every store keeps. `cake_hf.testing.StoreContract` is the same text as tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cake_hf.arithmetic.errors import CorruptChunk, is_a_fault
from cake_hf.stores.pieces import Part, copy

__all__ = ["MAX_NOTE_BYTES", "MOST_NOTES", "Part", "Store", "place_of", "scatter", "total_bytes"]


MAX_NOTE_BYTES = 2**19
MOST_NOTES = 64
"""Notes, and bytes of one, that are read; see `Store.notes`."""


class Store(ABC):
    """Keyed values of bytes. A store knows nothing of tensors: what a value means is the codec's business.

    The contract:

    * A key is 40 lower-case hexadecimal digits; equal keys mean equal values, so a value is never updated in part.
    * All methods may be called from many threads, and the same place may be opened by many processes.
    * A value that can be listed is complete: it appears at once, whole, or not at all, whenever a writer dies.
    * A miss is `None` or `False`, never an exception. A fault is a `StoreError` that says what to do.
    * Buffers are scattered to and gathered from as they are; a store keeps no reference to them.

    Attributes:
        reads_ranges: whether `read_range` brings no more than it is asked for. Where it does not, nobody should call it often.
        range_seconds: what reading a range costs beyond its share of the value, roughly.
        read_only: nothing can ever be written here: `write`, `delete` and `check_writable` raise a StoreError, and a cache
            does not try to save. `cake_hf.testing.ReadOnlyContract` has the tests of such a store.
        counts_hits: whether prompts are counted among the notes; not where they are none of a user's.
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
        """Store the parts, joined, durably: when this returns, the value survives the process and the machine.

        Returns:
            False if the key was there and `replace` is not asked for; then nothing was written.

        Raises:
            StoreError: the value cannot be written; nothing of it is listed then.
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
        """Fill the writable byte buffers, in order, with the value's bytes from `offset` on. By default by reading it whole.

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
        """The first bytes of a value, at most as many as it has been written with; None for a miss. Raises as `read_range`."""
        found = bytearray(nbytes)
        return bytes(found) if self.read_range(key, [memoryview(found)], 0) else None

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> int | None:
        """As `read_into`, and calls `arrived(n)` whenever the first n parts are there; by default once, when all are.

        Whoever checks bytes does it best while they are in the processor's cache. What `arrived` raises ends the read.
        """
        count = self.read_into(key, parts)
        if count is not None:
            arrived(len(parts))
        return count

    def check_writable(self) -> None:
        """Raise a StoreError that says what to do if nothing can be written here. By default all is well."""

    def look_only(self) -> None:
        """The store was opened to be read: until something is written after all, reading leaves no trace in it
        (no time of last use, no notes). By default it leaves none anyway."""

    def leaves_traces(self) -> bool:
        """Whether notes may be written to `notes_folder`."""
        return True

    def objection(self, namespace: str, facts: Callable[[], Mapping[str, Any]]) -> str:
        """Why nothing in here can serve that namespace, as a clause for people; empty if something may.

        Asked when a prompt found nothing; never raises and never waits. By default a store does not know what its values
        were made from.

        Args:
            namespace: digest that the keys were made with.
            facts: gives what it is the digest of, without the salt.
        """
        return ""

    def notes_folder(self) -> Path | None:
        """A folder of this machine for small files about this store (it may not exist yet), or None if there is none."""
        return None

    def notes(self) -> Mapping[str, bytes]:
        """What `put_note` has kept, by name, as far as it is not absurd: whoever can write to the place can change notes.

        By default a store keeps none.

        Raises:
            StoreError: they cannot be read.
        """
        return {}

    def put_note(self, name: str, note: bytes | None) -> None:
        """Keep a note about what is stored, in the place of the other one of that name; None removes it.

        Notes are no values: `keys` does not list them, and nothing but words for people depends on them. By default nothing is
        kept.

        Args:
            name: 40 lower-case hexadecimal digits.
            note: at most `MAX_NOTE_BYTES`.

        Raises:
            StoreError: it cannot be kept.
        """

    def identity(self) -> Hashable:
        """Equal for two stores of this process that are the same place. By default a store object is a place of its own."""
        return (type(self).__name__, id(self))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was written is where it is to be; False if `timeout` seconds did not suffice.

        By default `write` has done it all.
        """
        return True

    def close(self) -> None:
        """Give back what the store holds open. May be called twice."""

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
