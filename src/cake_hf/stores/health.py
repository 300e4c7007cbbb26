"""Tier health: the counts of one tier, whether it is in trouble, and how fast it reads."""

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
"""Faults in a row after which the store counts as failing, not just a value. (A single bad sector does not condemn a disk.)"""

REST_SECONDS = 15.0
"""Seconds that a failing store is left alone, so that not every chunk of every prompt waits for its time-out."""

STUCK_SECONDS = 10.0
"""Seconds after which a running operation counts as trouble while it lasts: a lost disk or mount may never report an error."""

MOST_SHUNNED = 4096
"""Most quarantined keys per store."""

NEW_WEIGHT = 0.3
"""Weight of the newest read in the smoothed pace."""

FORGETTING = 0.98
"""Factor on a store's pace each time it is passed over for being slow, so that a store that was slow once is tried again."""


@dataclass(frozen=True)
class TierCounts:
    """The counts of one tier so far.

    Attributes:
        name: name of its store.
        reads: values, or ranges of values, that were read from it.
        bytes_read: bytes of those reads.
        written: values that `write` put there, at once or behind.
        promoted: values copied there from a farther tier.
        skipped: values not written or copied there because the queue was full or the tier was in trouble.
        faults: operations that it refused or failed, including values of a wrong size.
    """

    name: str
    reads: int = 0
    bytes_read: int = 0
    written: int = 0
    promoted: int = 0
    skipped: int = 0
    faults: int = 0


class Health:
    """Tracks whether one kind of operation is in trouble. Called with its owner's lock held.

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
        """Records the start of an operation; returns its number for `end`."""
        self._begun += 1
        self._under_way[self._begun] = self._clock()
        return self._begun

    def end(self, number: int, *, well: bool) -> None:
        """Records the end of an operation."""
        self._under_way.pop(number, None)  # absent in a forked child, if the operation started in the parent
        self._faults_in_a_row = 0 if well else self._faults_in_a_row + 1
        rests = self._faults_in_a_row >= FAULTS_TO_REST
        self._rests_until = self._clock() + REST_SECONDS if rests else float("-inf")

    def in_trouble(self) -> bool:
        """Returns whether the last operations failed, or one hangs."""
        now = self._clock()
        return now < self._rests_until or now - min(self._under_way.values(), default=now) > STUCK_SECONDS


class TierHealth:
    """The health of one tier. All methods may be called from any thread.

    Reads and writes are tracked separately: a full disk still reads well.

    Args:
        name: name of the store, for messages.
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
        """Returns a snapshot of the counts."""
        with self._lock:
            return self._counts

    def count(self, **more: int) -> None:
        """Adds to the counts of these names."""
        with self._lock:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})

    # Operations. Their errors are counted, and the first of each kind is logged.

    def look(self, what: str, call: Callable[[], T]) -> T:
        """Runs an operation that queries the store.

        Args:
            what: the operation as a past participle, for the message.
            call: the operation.

        Raises:
            Exception: whatever the operation raised.
        """
        with self._watched(self._reads, what):
            return call()

    def change(self, what: str, call: Callable[[], T]) -> T:
        """Runs an operation that changes the store; otherwise like `look`."""
        with self._watched(self._writes, what):
            return call()

    def read(self, nbytes: int, call: Callable[[], T | None]) -> T | None:
        """Runs a read of that many bytes and learns the store's pace from it, unless it is a miss; otherwise like `look`."""
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
                # Concurrent reads share the bandwidth, so the time of one is divided by their number.
                pace = (self._clock() - begin) / nbytes / together
                self._pace = pace if not self._pace else self._pace + NEW_WEIGHT * (pace - self._pace)
        return result

    def reads_badly(self) -> bool:
        """Returns whether the store should not be read from for the moment."""
        with self._lock:
            return self._reads.in_trouble()

    def writes_badly(self) -> bool:
        """Returns whether the store should not be written to for the moment."""
        with self._lock:
            return self._writes.in_trouble()

    # Pace.

    def seconds_until_read(self, nbytes: int) -> tuple[float, int]:
        """Returns the seconds that one more read would take (0 if nothing was measured yet), and the reads under way."""
        with self._lock:
            return self._pace * nbytes * (self._reading + 1), self._reading

    def passed_over(self) -> None:
        """Records that another store is read because this one seems slower."""
        with self._lock:
            self._pace *= FORGETTING

    # Quarantine: values that are known to be wrong and cannot be replaced.

    def quarantine(self, key: str) -> None:
        """Quarantines a key: from now on the store counts as not having it."""
        with self._lock:
            self._shunned[key] = None
            if len(self._shunned) > MOST_SHUNNED:
                self._shunned.popitem(last=False)

    def welcome(self, key: str) -> None:
        """Lifts the quarantine of a key, whose value is good again or gone."""
        with self._lock:
            self._shunned.pop(key, None)

    def shuns(self, key: str) -> bool:
        """Returns whether a key is quarantined."""
        with self._lock:
            return key in self._shunned

    def _renew(self) -> None:
        """Resets a forked child: other threads' operations end in the parent only."""
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
            well = isinstance(error, CorruptChunk)  # then the value is at fault, not the store
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
