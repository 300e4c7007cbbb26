"""A store in this process's memory: for tests, and as the nearest tier within one run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.stores.base import Part, Store, refuse_longer, scatter, total_bytes
from cake_hf.stores.pieces import joined
from cake_hf.util.forks import Lock


class MemoryStore(Store):
    """A dict under a lock, with a byte budget; the least recently used values are evicted first.

    Args:
        budget_bytes: most bytes of values that are kept at once.
    """

    reads_ranges = True
    range_seconds = 1e-5
    in_memory = True

    def __init__(self, budget_bytes: int = 4 * 2**30) -> None:
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be positive, got {budget_bytes}.")
        self._budget = budget_bytes
        self._used = 0
        self._values: OrderedDict[str, bytearray] = OrderedDict()
        self._notes: dict[str, bytes] = {}
        self._lock = Lock()

    def budget(self) -> int:
        """Returns the byte budget."""
        return self._budget

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._lock:
            return [key in self._values for key in keys]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        value = self._touched(key)
        if value is None:
            return None
        if len(value) != total_bytes(parts):
            raise CorruptChunk(f"Chunk {key} has {len(value)} bytes, {total_bytes(parts)} were expected.")
        scatter(memoryview(value), parts, key)
        return len(value)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        value = self._touched(key)
        if value is not None:
            scatter(memoryview(value)[offset:], parts, key)
        return value is not None

    def read_up_to(self, key: str, buffer: memoryview) -> int | None:
        value = self._touched(key)
        if value is None:
            return None
        refuse_longer(key, len(value), buffer)
        scatter(memoryview(value), [buffer[: len(value)]], key)
        return len(value)

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        value = joined(parts)
        if len(value) > self._budget:
            raise StoreError(f"A value of {len(value)} bytes is over the store's budget of {self._budget}; raise it.")
        with self._lock:
            if key in self._values and not replace:
                return False
            self._drop(key)
            self._values[key] = value
            self._used += len(value)
            while self._used > self._budget:
                self._drop(next(iter(self._values)))
            return True

    def delete(self, key: str) -> bool:
        with self._lock:
            return self._drop(key)

    def keys(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._values))

    def size(self, key: str) -> int | None:
        with self._lock:
            value = self._values.get(key)
            return None if value is None else len(value)

    def notes(self) -> Mapping[str, bytes]:
        with self._lock:
            return dict(self._notes)

    def put_note(self, name: str, note: bytes | None) -> None:
        with self._lock:
            self._notes.pop(name, None)
            if note is not None:
                self._notes[name] = note

    def _touched(self, key: str) -> bytearray | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def _drop(self, key: str) -> bool:
        value = self._values.pop(key, None)
        self._used -= len(value or b"")
        return value is not None
