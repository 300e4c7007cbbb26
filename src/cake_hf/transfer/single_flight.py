"""What the restores of one process share that use one place of chunks: a budget of reads, and the chunks they make.

Prompts that run at the same time often begin alike. A chunk that one of them loads or computes is not loaded or computed a
second time beside it: the others wait for it and copy it (single flight). Equal keys mean equal KV, so no bit depends on it.
Nobody waits for ever: waits have bounds, and whoever waits in vain does the work itself. Nor in a circle: who computes a chunk
waits only for chunks before it, who loads one for nobody.

A read cannot be ended from outside. One whose restore is over is left to its thread, and nobody waits for it; but a store that
hangs would cost two threads, and what they hold, for each prompt. So those that were left are counted beside the budget, and
what still has not come back when its reader's patience is over *hangs*: as long as as many hang as may be under way, none
begins. A read that was only overtaken keeps nobody from loading.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from cake_hf.stores.base import Store, place_of
from cake_hf.transfer.deadline import Late
from cake_hf.transfer.fault_log import FaultLog
from cake_hf.util.forks import Lock, renewed_in_child
from cake_hf.util.interrupts import faults_suppressed

LEFT_PER_READ = 3
"""Reads that were left, hanging or not, for each that may be under way; beyond that nothing begins before some come back."""

Payload = torch.Tensor
"""`[nbytes]` uint8 on the host: a chunk's pieces, back to back."""


class Flight:
    """One chunk that somebody loads or computes.

    Attributes:
        owner: the restore that does.
        computes: it is computed, not loaded.
        saves: the owner will bring it to the store, if it is not there.
    """

    def __init__(self, owner: object, *, computes: bool, saves: bool) -> None:
        self.owner = owner
        self.computes = computes
        self.saves = saves
        self._lock = Lock()
        self._ended = threading.Event()
        self._followers = 0
        self._payload: Payload | None = None

    def follow(self) -> None:
        """Ask for a copy of the chunk when it is there."""
        with self._lock:
            self._followers += 1

    def wait(self, seconds: float) -> bool:
        """Until the flight has ended, one way or another; False if it has not within that time."""
        return self._ended.wait(seconds)

    @property
    def followed_by(self) -> int:
        """How many wait for the chunk."""
        with self._lock:
            return self._followers

    @property
    def payload(self) -> Payload | None:
        """The chunk, once the flight has ended; None if it failed, or nobody followed in time."""
        return self._payload

    def end(self, payload: Callable[[], Payload] | None) -> None:
        """The owner is done; `payload` copies the chunk out, and is called only if somebody follows. The first end counts."""
        with self._lock:
            if self._ended.is_set():
                return
            try:
                if payload is not None and self._followers:
                    # Where there is no memory for a copy, the others, for whom it is, make the chunk themselves.
                    with faults_suppressed(MemoryError, RuntimeError):
                        self._payload = payload()
            finally:
                self._ended.set()


class ReadSlot:
    """A read that may begin, and then is under way. Get it from `Sharing`, which is kept alive by it.

    Attributes:
        due: when it counts as one that hangs, if it is left.
    """

    def __init__(self, sharing: Sharing, due: float) -> None:
        self._sharing = sharing
        self.due = due

    def leave(self) -> None:
        """Nobody waits for the read any more, though its thread may still be at it. Does nothing once it has ended."""
        self._sharing._leave(self)

    def release(self) -> None:
        """The read has ended. May be called more than once."""
        self._sharing._release(self)


class Sharing:
    """Get it from `sharing_of`. Invariants: at most as many reads are under way as the least generous reader allows at its
    beginning; of each key there is at most one flight on the board.

    Args:
        clock: monotonic seconds.

    Attributes:
        lookups: the questions to the place of chunks that were not answered in time.
        notes: the same, of where notes about it are.
        endings: the same, of flushing and closing its stores.
        claims: the same, of writing what a model computes (`model.reference`).
        faults: of lookups; forgotten when one succeeds.
        unsaved: faults of writing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lookups, self.notes, self.endings, self.claims = Late(), Late(), Late(), Late()
        self.faults, self.unsaved = FaultLog(), FaultLog()
        self._clock = clock
        self._renew()
        renewed_in_child(self._renew)

    def _renew(self) -> None:
        """As new. In a child too: what other threads had begun ends in the parent only."""
        self._lock = threading.RLock()  # a cache that is collected while its thread holds it abandons its flights
        self._changed = threading.Condition(self._lock)
        self._reads: set[ReadSlot] = set()  # of the budget
        self._beside: set[ReadSlot] = set()
        self._left: set[ReadSlot] = set()
        self._board: dict[str, Flight] = {}

    def forget_faults(self) -> None:
        """All is well again: the next fault is told."""
        self.faults = FaultLog()

    def reads(self) -> int:
        """How many reads are under way."""
        with self._lock:
            return len(self._reads)

    def begin_read(self, limit: int, until: Callable[[], bool], patience: float = math.inf) -> ReadSlot | None:
        """Wait for a place among at most `limit` reads; None if the store hangs, or the place is not needed any more.

        Args:
            limit: of reads that are under way.
            until: says that it is not needed; asked whenever a read ends, and after `wake`.
            patience: seconds after which the read hangs, if it was left.
        """
        with self._lock:
            while not until() and self.hanging() < limit:
                if len(self._reads) < limit and not self._too_many_left(limit):
                    return self._begin(self._reads, patience)
                self._changed.wait(self._until_one_hangs())
            return None

    def begin_beside(self, limit: int, patience: float) -> ReadSlot | None:
        """As `begin_read`, for a read beside the budget: it never waits."""
        with self._lock:
            refused = self.hanging() >= limit or self._too_many_left(limit)
            return None if refused else self._begin(self._beside, patience)

    def hanging(self) -> int:
        """How many reads were left and have not come back within their reader's patience."""
        with self._lock:
            now = self._clock()
            return sum(slot.due <= now for slot in self._left)

    def flights(self) -> list[Flight]:
        """What is on the board."""
        with self._lock:
            return list(self._board.values())

    def wake(self) -> None:
        """Let those who wait for a place ask again whether they need one."""
        with self._lock:
            self._changed.notify_all()

    @contextmanager
    def flight(self, key: str, owner: object, *, computes: bool, saves: bool = False) -> Iterator[FlightPlan]:
        """Lead the flight of a chunk, or follow whoever leads it. A flight that the caller leads ends with the body.

        Two sides do not wait for each other, but work on the chunk side by side: those of one restore (see `Frontier`), and who
        computes does not wait for a load, which may be late.

        Args:
            key: of the chunk.
            owner: the restore.
            computes: it is about to compute the chunk, not to load it.
            saves: it will bring the chunk to the store.
        """
        with self._lock:
            found = self._board.get(key)
            if found is None:
                led = self._board[key] = Flight(owner, computes=computes, saves=saves)
            elif found.owner is owner or (computes and not found.computes):
                yield_to = None
            else:
                found.follow()
                yield_to = found
        if found is not None:
            yield FlightPlan(yield_to)
            return
        plan = FlightPlan(None)
        try:
            yield plan
        finally:
            with self._lock:
                if self._board.get(key) is led:
                    del self._board[key]
            led.end(plan.payload)

    def abandon(self, owner: object) -> None:
        """The owner's restore is over; what it has on the board is not coming, or not in time."""
        with self._lock:
            left = [(key, flight) for key, flight in self._board.items() if flight.owner is owner]
            for key, _ in left:
                del self._board[key]
        for _, flight in left:
            flight.end(None)

    def _begin(self, among: set[ReadSlot], patience: float) -> ReadSlot:
        slot = ReadSlot(self, self._clock() + patience)
        among.add(slot)
        return slot

    def _too_many_left(self, limit: int) -> bool:
        return len(self._left) >= LEFT_PER_READ * limit

    def _until_one_hangs(self) -> float | None:
        now = self._clock()
        soonest = min((slot.due for slot in self._left if slot.due > now), default=math.inf)
        return min(soonest - now, threading.TIMEOUT_MAX)

    def _leave(self, slot: ReadSlot) -> None:
        with self._lock:
            if slot in self._reads or slot in self._beside:
                self._forget(slot)
                self._left.add(slot)
                self._changed.notify_all()

    def _release(self, slot: ReadSlot) -> None:
        with self._lock:
            self._forget(slot)
            self._changed.notify_all()

    def _forget(self, slot: ReadSlot) -> None:
        for slots in (self._reads, self._beside, self._left):
            slots.discard(slot)


class FlightPlan:
    """What to do about a chunk.

    Attributes:
        followed: the flight to wait for; None if the caller does the work itself.
        payload: set by a caller who has done it, to how the chunk can be copied out.
    """

    def __init__(self, followed: Flight | None) -> None:
        self.followed = followed
        self.payload: Callable[[], Payload] | None = None


_known: weakref.WeakValueDictionary[Hashable, Sharing] = weakref.WeakValueDictionary()
_lock = Lock()


def sharing_of(store: Store) -> Sharing:
    """What all users of a place of chunks share in this process, also through several store objects. Keep it while in use."""
    place = place_of(store)
    with _lock:
        sharing = _known.get(place)
        if sharing is None:
            sharing = _known[place] = Sharing()
        return sharing
