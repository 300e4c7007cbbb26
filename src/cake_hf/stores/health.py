"""Tier health: the counts of one tier, its circuit breakers, and the keys that are quarantined there."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from cake_hf.errors import CorruptChunk, is_a_fault
from cake_hf.util.forks import Lock, renewed_in_child

logger = logging.getLogger("cake_hf")

FAULTS_TO_REST = 2
"""Faults in a row after which the store counts as failing, not just a value. (A single bad sector does not condemn a disk.)"""

REST_SECONDS = 15.0
"""Seconds that a failing store is left alone, so that not every chunk of every prompt waits for its time-out."""

STUCK_SECONDS = 10.0
"""Seconds after which a running operation counts as trouble while it lasts: a lost disk or mount may never report an error."""

MOST_QUARANTINED = 4096
"""Most quarantined keys per store."""


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


class Breaker:
    """A circuit breaker for one kind of operation. Called with its owner's lock held."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._faults_in_a_row = 0
        self._rests_until = float("-inf")
        self.under_way: dict[object, float] = {}
        """Operation -> when it started."""

    def start(self) -> object:
        """Records the start of an operation, and returns the operation for `end`."""
        operation = object()
        self.under_way[operation] = self._clock()
        return operation

    def end(self, operation: object, *, well: bool) -> None:
        """Records the end of an operation."""
        self.under_way.pop(operation, None)  # absent in a forked child, if the operation started in the parent
        self._faults_in_a_row = 0 if well else self._faults_in_a_row + 1
        rests = self._faults_in_a_row >= FAULTS_TO_REST
        self._rests_until = self._clock() + REST_SECONDS if rests else float("-inf")

    def is_open(self) -> bool:
        """Returns whether the last operations failed, or one hangs."""
        now = self._clock()
        return now < self._rests_until or now - min(self.under_way.values(), default=now) > STUCK_SECONDS


class TierHealth:
    """The health of one tier. All methods may be called from any thread.

    Reads and writes have a breaker each: a full disk still reads well.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self._clock = clock
        self._lock = Lock()
        self._counts = TierCounts(name)
        self._told: set[tuple[str, str]] = set()
        self._quarantined: OrderedDict[str, None] = OrderedDict()
        self._close_breakers()
        renewed_in_child(self._close_breakers)

    def counts(self) -> TierCounts:
        """Returns a snapshot of the counts."""
        return self._counts

    def count(self, **more: int) -> None:
        """Adds to the counts of these names."""
        with self._lock:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})

    def look(self, what: str) -> AbstractContextManager[None]:
        """Watches over an operation that queries the store; its faults are counted, and the first of each kind is logged.

        Args:
            what: the operation as a past participle, for the message.
        """
        return self._watched(self._reads, what)

    def change(self, what: str) -> AbstractContextManager[None]:
        """Watches over an operation that changes the store; otherwise like `look`."""
        return self._watched(self._writes, what)

    def reads_badly(self) -> bool:
        """Returns whether the store should not be read from for the moment."""
        with self._lock:
            return self._reads.is_open()

    def writes_badly(self) -> bool:
        """Returns whether the store should not be written to for the moment."""
        with self._lock:
            return self._writes.is_open()

    def load(self) -> tuple[int, int]:
        """Returns how busy the store is: the operations under way, and the reads so far."""
        with self._lock:
            return len(self._reads.under_way), self._counts.reads

    # Quarantine: values that are known to be wrong and cannot be replaced.

    def quarantine(self, key: str) -> None:
        """Quarantines a key: from now on the store counts as not having it."""
        with self._lock:
            self._quarantined[key] = None
            if len(self._quarantined) > MOST_QUARANTINED:
                self._quarantined.popitem(last=False)

    def lift_quarantine(self, key: str) -> None:
        """Lifts the quarantine of a key, whose value is good again or gone."""
        with self._lock:
            self._quarantined.pop(key, None)

    def is_quarantined(self, key: str) -> bool:
        """Returns whether a key is quarantined."""
        return key in self._quarantined

    def _close_breakers(self) -> None:
        """Sets the breakers up; also in a forked child, since other threads' operations end in the parent only."""
        self._reads, self._writes = Breaker(self._clock), Breaker(self._clock)

    @contextmanager
    def _watched(self, breaker: Breaker, what: str) -> Iterator[None]:
        with self._lock:
            operation = breaker.start()
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
                breaker.end(operation, well=well)

    def _tell(self, what: str, error: BaseException) -> None:
        self.count(faults=1)
        kind = (what, type(error).__name__)
        with self._lock:
            is_new = kind not in self._told
            self._told.add(kind)
        if is_new:
            logger.warning("%s: a value cannot be %s; the other tiers go on. %s", self.name, what, error)
