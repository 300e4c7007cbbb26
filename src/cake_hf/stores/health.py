"""How one store among several is doing: what it was good for, whether it is in trouble, how fast it reads."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from cake_hf.errors import CorruptChunk, is_a_fault
from cake_hf.util.forks import Lock, renewed_in_child

logger = logging.getLogger("cake_hf")

T = TypeVar("T")

FAULTS_TO_REST = 2
"""So many faults in a row, and it is not one bad value but the store. (One bad sector is no reason to leave a disk alone.)"""

REST_SECONDS = 15.0
"""A store that fails is left alone for that long, so that not every chunk of every prompt waits for its time-out."""

STUCK_SECONDS = 10.0
"""An operation that takes longer counts as trouble while it lasts: of a lost disk or mount nobody ever hears."""

MOST_SHUNNED = 4096
"""Keys of wrong values that are remembered per store."""

NEW_WEIGHT = 0.3
"""Weight of the newest read in the smoothed pace."""

FORGETTING = 0.98
"""What is left of a pace each time it keeps a store from being read, so that one that was slow once is tried again."""


@dataclass(frozen=True)
class TierCounts:
    """What came of one tier so far.

    Attributes:
        name: of its store.
        reads: values, or ranges of one, that were read from it.
        bytes_read: of those.
        written: values put there by `write`, at once or behind.
        promoted: values copied there from a tier farther away.
        skipped: values that were to go there and did not: no room in the queue, or the tier was in trouble.
        faults: operations that it refused or failed, values of a wrong size among them.
    """

    name: str
    reads: int = 0
    bytes_read: int = 0
    written: int = 0
    promoted: int = 0
    skipped: int = 0
    faults: int = 0


class Health:
    """Whether one kind of operation had better be left alone for the moment. Called with its owner's lock held.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._under_way: dict[int, float] = {}
        self._begun = 0
        self._faults_in_a_row = 0
        self._rests_until = float("-inf")

    def begin(self) -> int:
        """An operation begins; its number is what ends it."""
        self._begun += 1
        self._under_way[self._begun] = self._clock()
        return self._begun

    def end(self, number: int, *, well: bool) -> None:
        """An operation is over."""
        self._under_way.pop(number, None)  # in a child it began in the parent
        self._faults_in_a_row = 0 if well else self._faults_in_a_row + 1
        rests = self._faults_in_a_row >= FAULTS_TO_REST
        self._rests_until = self._clock() + REST_SECONDS if rests else float("-inf")

    def in_trouble(self) -> bool:
        """Whether the last ones failed, or one hangs."""
        now = self._clock()
        return now < self._rests_until or now - min(self._under_way.values(), default=now) > STUCK_SECONDS


class TierHealth:
    """The record of one store. All methods may be called from any thread.

    Reading and writing are in trouble apart: a full disk reads well.

    Args:
        name: of the store, for messages.
        clock: monotonic seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self._clock = clock
        self._lock = Lock()
        self._counts = TierCounts(name)
        self._reads, self._writes = Health(clock), Health(clock)
        self._reading = 0
        self._pace = 0.0
        self._told: set[tuple[str, str]] = set()
        self._shunned: OrderedDict[str, None] = OrderedDict()
        renewed_in_child(self._renew)

    def counts(self) -> TierCounts:
        """A snapshot."""
        with self._lock:
            return self._counts

    def count(self, **more: int) -> None:
        """Add to the counts of these names."""
        with self._lock:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})

    # Operations. What they raise is counted, and the first of its kind is logged.

    def look(self, what: str, call: Callable[[], T]) -> T:
        """Run an operation that asks something of the store.

        Args:
            what: the operation as a past participle, for the message.
            call: the operation.

        Raises:
            Exception: whatever the operation raised.
        """
        with self._watched(self._reads, what):
            return call()

    def change(self, what: str, call: Callable[[], T]) -> T:
        """Run an operation that changes the store; as `look`."""
        with self._watched(self._writes, what):
            return call()

    def read(self, nbytes: int, call: Callable[[], T | None]) -> T | None:
        """Run a read of that many bytes, and learn the store's pace from it where it is no miss; else as `look`."""
        with self._lock:
            self._reading += 1
            together, begin = self._reading, self._clock()
        try:
            result = self.look("read", call)
        finally:
            with self._lock:
                self._reading -= 1
        if result is not None:
            self.count(reads=1, bytes_read=nbytes)
        if result is not None and nbytes:
            with self._lock:
                # Reads share a line: what one of them took is also the others' doing.
                pace = (self._clock() - begin) / nbytes / together
                self._pace = pace if not self._pace else self._pace + NEW_WEIGHT * (pace - self._pace)
        return result

    def reads_badly(self) -> bool:
        """Whether the store is better not asked for the moment."""
        with self._lock:
            return self._reads.in_trouble()

    def writes_badly(self) -> bool:
        """Whether the store is better not written to for the moment."""
        with self._lock:
            return self._writes.in_trouble()

    # Pace.

    def seconds_until_read(self, nbytes: int) -> tuple[float, int]:
        """When one more read would be through, and how many are under way; 0 seconds where nothing was measured yet."""
        with self._lock:
            return self._pace * nbytes * (self._reading + 1), self._reading

    def passed_over(self) -> None:
        """Another store is read because this one seems slower."""
        with self._lock:
            self._pace *= FORGETTING

    # Values that are known to be wrong and cannot be replaced.

    def quarantine(self, key: str) -> None:
        """From now on the store counts as not having this key."""
        with self._lock:
            self._shunned[key] = None
            if len(self._shunned) > MOST_SHUNNED:
                self._shunned.popitem(last=False)

    def welcome(self, key: str) -> None:
        """What the store has under this key is good again."""
        with self._lock:
            self._shunned.pop(key, None)

    def shuns(self, key: str) -> bool:
        """Whether the store's value of this key is known to be wrong."""
        with self._lock:
            return key in self._shunned

    def _renew(self) -> None:
        """What other threads had under way ends in the parent only."""
        self._reads, self._writes, self._reading = Health(self._clock), Health(self._clock), 0

    @contextmanager
    def _watched(self, health: Health, what: str) -> Iterator[None]:
        with self._lock:
            number = health.begin()
        well = False
        try:
            yield
            well = True
        except BaseException as error:
            well = isinstance(error, CorruptChunk)  # then it is the value that is not well
            if is_a_fault(error):
                self._tell(what, error)
            raise
        finally:
            with self._lock:
                health.end(number, well=well)

    def _tell(self, what: str, error: BaseException) -> None:
        self.count(faults=1)
        kind = (what, type(error).__name__)
        with self._lock:
            is_new = kind not in self._told
            self._told.add(kind)
        if is_new:
            logger.warning("%s: a value cannot be %s; the other tiers go on. %s", self.name, what, error)
