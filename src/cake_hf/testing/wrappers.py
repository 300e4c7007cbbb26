"""Wrappers around a store: one that is slow on purpose, one that fails on purpose, one with a gate."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cake_hf.errors import StoreError
from cake_hf.stores.base import Part, Store, scatter, total_bytes
from cake_hf.stores.wrappers import WrapperStore
from cake_hf.util.forks import Lock


class ThrottledStore(WrapperStore):
    """A store that reads at a given bandwidth, shared by all threads, as if over a network.

    Args:
        inner: the store with the values.
        bytes_per_second: bandwidth of all reads together.
        latency: seconds added to each read.
        clock: returns the time in seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        inner: Store,
        bytes_per_second: float,
        latency: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if latency < 0:
            raise ValueError("bytes_per_second must be positive and latency not negative.")
        super().__init__(inner)
        self.range_seconds += latency
        self.in_memory = False
        self.bytes_per_second = bytes_per_second
        self._latency = latency
        self._clock, self._sleep = clock, sleep
        self._line_free_at = 0.0
        self._lock = Lock()

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of all reads together. It may be set at any time and applies to reads that start later."""
        return self._rate

    @bytes_per_second.setter
    def bytes_per_second(self, rate: float) -> None:
        if not rate > 0:
            raise ValueError("bytes_per_second must be positive and latency not negative.")
        self._rate = rate

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        with self._on_the_line(total_bytes(parts)):
            return self.inner.read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        with self._on_the_line(total_bytes(parts)):
            return self.inner.read_range(key, parts, offset)

    @contextmanager
    def _on_the_line(self, nbytes: int) -> Iterator[None]:
        """Delays the end of the body's read until `nbytes` could have arrived."""
        arrival = self._book(nbytes) + self._latency
        yield
        self._sleep(max(0.0, arrival - self._clock()))

    def _book(self, nbytes: int) -> float:
        """Returns when the last of these bytes arrives over the line, which carries one value after the other."""
        with self._lock:
            begin = max(self._clock(), self._line_free_at)
            self._line_free_at = begin + nbytes / self._rate
            return self._line_free_at


READ_FAULTS = ("drop", "truncate", "flip", "error", "stall", "lie")
WRITE_FAULTS = ("tear",)
FAULTS = (*READ_FAULTS, *WRITE_FAULTS)


class FaultStore(WrapperStore):
    """A store whose reads and writes fail, for chosen keys or at random from a seed.

    Args:
        inner: the store with the values.
        faults: key -> one of `FAULTS`. Faults of reads: "drop" (a listed value is gone), "truncate" (the value ends early),
            "flip" (one bit of the payload is wrong), "error" (the read raises), "stall" (the read hangs until `release()`),
            "lie" (a chunk that passes every check, with KV that no model made). Faults of writes: "tear" (half of the value
            is listed, then the write raises, as in a store that breaks the contract).
        rate: share of all other reads that get a random fault (and of all other writes, if `kinds` has faults of writes).
        kinds: faults that the random choice picks from.
        seed: seed of the random choice.
    """

    def __init__(
        self,
        inner: Store,
        faults: dict[str, str] | None = None,
        *,
        rate: float = 0.0,
        kinds: Sequence[str] = ("drop", "truncate", "flip", "error"),
        seed: int = 0,
    ) -> None:
        unknown = {*(faults or {}).values(), *kinds} - set(FAULTS)
        if unknown:
            raise ValueError(f"Unknown faults {sorted(unknown)}; known are {', '.join(FAULTS)}.")
        super().__init__(inner)
        self.faults = dict(faults or {})
        self._rate, self._kinds, self._random = rate, tuple(kinds), random.Random(seed)
        self._lock = Lock()
        self._released = threading.Event()
        self.injected: list[tuple[str, str]] = []

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        return total_bytes(parts) if self._misread(key, parts, lambda: self._inner_read(key, parts)) else None

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        return self._misread(key, parts, lambda: self.inner.read_range(key, parts, offset), offset)

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        if self._choose(key, WRITE_FAULTS) is None or (not replace and self.inner.contains([key])[0]):
            return self.inner.write(key, parts, replace=replace)
        value = b"".join(parts)
        self.inner.write(key, [value[: len(value) // 2]], replace=True)
        raise StoreError(f"An injected fault after half of chunk {key} was written.")

    def release(self) -> None:
        """Lets stalled reads go on; they then fill their buffers with garbage, as a broken client might."""
        self._released.set()

    def _inner_read(self, key: str, parts: Sequence[memoryview]) -> bool:
        return self.inner.read_into(key, parts) is not None

    def _misread(self, key: str, parts: Sequence[memoryview], read: Callable[[], bool], offset: int = 0) -> bool:
        """Reads with the fault chosen for this read, if any; returns False for a miss."""
        fault = self._choose(key, READ_FAULTS)
        if fault == "drop":
            return False
        if fault == "error":
            raise StoreError(f"An injected fault at chunk {key}.")
        if fault == "stall":
            self._released.wait()
            for part in parts:
                part[:] = b"\xa5" * part.nbytes
            return True
        if fault == "lie":
            return self._read_lie(key, parts, offset)
        found = read()
        if fault == "truncate":
            parts[-1][:] = bytes(parts[-1].nbytes)
        elif fault == "flip":
            middle = parts[len(parts) // 2]
            middle[middle.nbytes // 2] ^= 1
        return found

    def _read_lie(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        from cake_hf.chunks.encoded_header import is_encoded  # imports torch, which the other faults do not need
        from cake_hf.testing.forgery import blank, forge, one_bit

        value = self.inner.read(key)
        if value is not None:
            # A blank chunk would be encoded in fewer bytes than its reader expects.
            scatter(memoryview(forge(value, one_bit if is_encoded(value) else blank))[offset:], parts, key)
        return value is not None

    def _choose(self, key: str, possible: Sequence[str]) -> str | None:
        """Chooses the fault, if any, and records it in `injected`."""
        with self._lock:
            fault = self.faults.get(key)
            kinds = [kind for kind in self._kinds if kind in possible]
            if fault is None and kinds and self._random.random() < self._rate:
                fault = self._random.choice(kinds)
            if fault is None or fault not in possible:
                return None
            self.injected.append((key, fault))
            return fault


@contextmanager
def expected_faults() -> Iterator[None]:
    """Silences the library's warnings: injected faults would be logged like real ones, although they are expected."""
    logger = logging.getLogger("cake_hf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class GateStore(WrapperStore):
    """A store whose reads wait at a gate, so that a test decides where the two sides meet.

    Args:
        inner: the store with the values.
        timeout: seconds after which a waiting test fails instead of hanging.
        ranges: whether values may be read in ranges, each of which counts as a read; otherwise they are read whole.
    """

    def __init__(self, inner: Store, timeout: float = 60.0, *, ranges: bool = False) -> None:
        super().__init__(inner)
        self.reads_ranges = ranges and inner.reads_ranges
        self._timeout = timeout
        self._state = threading.Condition()
        self._let_through = 0.0
        self._reads_begun = 0
        self._reads_done = 0

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        with self._through_the_gate():
            return self.inner.read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        with self._through_the_gate():
            return self.inner.read_range(key, parts, offset)

    @contextmanager
    def _through_the_gate(self) -> Iterator[None]:
        with self._state:
            self._reads_begun += 1
            number = self._reads_begun
            self._state.notify_all()
        self._await(lambda: number <= self._let_through)
        try:
            yield
        finally:
            with self._state:
                self._reads_done += 1
                self._state.notify_all()

    def open(self, reads: float = math.inf) -> None:
        """Lets the first `reads` reads through, counted from the very first one; by default all, present and future."""
        with self._state:
            self._let_through = reads
            self._state.notify_all()

    def await_begun(self, count: int) -> None:
        """Blocks until that many reads have reached the gate."""
        self._await(lambda: self._reads_begun >= count)

    def await_reads(self, count: int) -> None:
        """Blocks until that many reads are done."""
        self._await(lambda: self._reads_done >= count)

    def _await(self, condition: Callable[[], bool]) -> None:
        with self._state:
            if not self._state.wait_for(condition, self._timeout):
                raise TimeoutError("The gate was waited for in vain.")
