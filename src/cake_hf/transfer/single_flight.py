"""State shared by the restores of one process that use the same place of chunks: a read budget, and the chunks they make.

Prompts that run at the same time often start with the same tokens. A chunk that one of them loads or computes is not loaded or
computed a second time concurrently: the others wait for it and copy it (single flight). Equal keys mean equal KV, so no bit
depends on this. All waits are bounded, and a restore that waits in vain does the work itself. Waits cannot form a cycle: the
leader that computes a chunk waits only for chunks before it, and the leader that loads a chunk waits for none.

A read cannot be ended from outside. When its restore is over, it becomes an abandoned read: it is left to its thread, and
nothing waits for it. But a store that hangs would cost two threads, and what they hold, for each prompt. Abandoned reads are
therefore counted beside the budget, and one that has not returned when its reader's patience is over *hangs*: while as many
hang as may be under way, no read starts. A read that was merely superseded does not keep any restore from loading.
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
from cake_hf.transfer.chunk_reads import SeenForms
from cake_hf.transfer.deadline import Late
from cake_hf.transfer.telemetry import FaultLog
from cake_hf.util.forks import Lock, renewed_in_child
from cake_hf.util.interrupts import faults_suppressed

LEFT_PER_READ = 3
"""Abandoned reads, hanging or not, per read that may be under way; beyond that, no read starts until some return."""

Payload = torch.Tensor
"""`[nbytes]` uint8 on the host: a chunk's pieces, back to back."""


class Flight:
    """One chunk that a restore is loading or computing.

    Attributes:
        owner: that restore.
        computes: whether the chunk is computed, not loaded.
        saves: whether the owner will save the chunk to the store if it is not there.
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
        """Requests a copy of the chunk once it is there."""
        with self._lock:
            self._followers += 1

    def wait(self, seconds: float) -> bool:
        """Waits until the flight has ended, successfully or not; False if it has not within that time."""
        return self._ended.wait(seconds)

    @property
    def followed_by(self) -> int:
        """Number of followers waiting for the chunk."""
        with self._lock:
            return self._followers

    @property
    def payload(self) -> Payload | None:
        """The chunk, once the flight has ended; None if the flight failed or had no follower in time."""
        return self._payload

    def end(self, payload: Callable[[], Payload] | None) -> None:
        """Ends the flight; `payload` copies the chunk out, and is called only if there are followers. The first end counts."""
        with self._lock:
            if self._ended.is_set():
                return
            try:
                if payload is not None and self._followers:
                    # Without memory for a copy, the followers make the chunk themselves.
                    with faults_suppressed(MemoryError, RuntimeError):
                        self._payload = payload()
            finally:
                self._ended.set()


class ReadSlot:
    """Permission for a read, which then counts as under way. Get it from `Sharing`, which it keeps alive.

    Attributes:
        due: when the read counts as hanging, if it is abandoned.
    """

    def __init__(self, sharing: Sharing, due: float) -> None:
        self._sharing = sharing
        self.due = due

    def leave(self) -> None:
        """Abandons the read, though its thread may still be busy with it. Does nothing once the read has ended."""
        self._sharing._leave(self)

    def release(self) -> None:
        """Reports that the read has ended. May be called more than once."""
        self._sharing._release(self)


class Sharing:
    """The shared state of one place of chunks. Get it from `sharing_of`.

    Invariants: a read starts only while fewer reads than its reader's limit are under way; each key has at most one flight on
    the board.

    Attributes:
        lookups: questions to the place of chunks that were not answered in time.
        notes: the same for questions where notes about the place are.
        endings: the same for flushing and closing its stores.
        claims: the same for writing what a model computes (`model.reference`).
        faults: the faults of prefix matches; forgotten when one succeeds.
        unsaved: faults of writing.
        forms: the forms of the chunks that were read.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lookups, self.notes, self.endings, self.claims = Late(), Late(), Late(), Late()
        self.faults, self.unsaved = FaultLog(), FaultLog()
        self.forms = SeenForms()
        self._clock = clock
        self._renew()
        renewed_in_child(self._renew)

    def _renew(self) -> None:
        """Resets the state. Also in a forked child: what other threads had started ends in the parent only."""
        self._lock = threading.RLock()  # reentrant: a cache collected meanwhile abandons its flights
        self._changed = threading.Condition(self._lock)
        self._reads: set[ReadSlot] = set()  # within the budget
        self._beside: set[ReadSlot] = set()
        self._left: set[ReadSlot] = set()
        self._board: dict[str, Flight] = {}

    def forget_faults(self) -> None:
        """Forgets the faults, because all is well again: the next fault is logged as a warning."""
        self.faults = FaultLog()

    def reads(self) -> int:
        """Returns how many reads are under way."""
        with self._lock:
            return len(self._reads)

    def begin_read(self, limit: int, until: Callable[[], bool], patience: float = math.inf) -> ReadSlot | None:
        """Waits for a slot among at most `limit` reads; None if the store hangs or the slot is not needed any more.

        Args:
            limit: maximum number of reads under way.
            until: returns whether the slot is no longer needed; called whenever a read ends, and after `wake`.
            patience: seconds after which the read hangs if it is abandoned.
        """
        with self._lock:
            while not until() and self.hanging() < limit:
                if len(self._reads) < limit and not self._too_many_left(limit):
                    return self._begin(self._reads, patience)
                self._changed.wait(self._until_one_hangs())
            return None

    def begin_beside(self, limit: int, patience: float) -> ReadSlot | None:
        """Works like `begin_read`, for a read beside the budget: it never waits."""
        with self._lock:
            refused = self.hanging() >= limit or self._too_many_left(limit)
            return None if refused else self._begin(self._beside, patience)

    def hanging(self) -> int:
        """Returns how many abandoned reads have not returned within their reader's patience."""
        with self._lock:
            now = self._clock()
            return sum(slot.due <= now for slot in self._left)

    def flights(self) -> list[Flight]:
        """Returns the flights on the board."""
        with self._lock:
            return list(self._board.values())

    def wake(self) -> None:
        """Makes threads that wait for a slot check again whether they need one."""
        with self._lock:
            self._changed.notify_all()

    @contextmanager
    def flight(self, key: str, owner: object, *, computes: bool, saves: bool = False) -> Iterator[FlightPlan]:
        """Leads the flight of a chunk, or follows its leader. A flight that the caller leads ends with the `with` body.

        In two cases the caller does not wait but works on the chunk concurrently with the leader: if both belong to one restore
        (see `Frontier`), and if the caller computes and the leader loads, since the load may be late.

        Args:
            owner: the restore.
            computes: whether it is about to compute the chunk, not to load it.
            saves: whether it will save the chunk to the store.
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
        """Ends the owner's flights because its restore is over: their chunks will not arrive, or not in time."""
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
    """Says how the caller gets a chunk.

    Attributes:
        followed: the flight to wait for; None if the caller does the work itself.
        payload: set by a caller that has done the work, to a function that copies the chunk out.
    """

    def __init__(self, followed: Flight | None) -> None:
        self.followed = followed
        self.payload: Callable[[], Payload] | None = None


_known: weakref.WeakValueDictionary[Hashable, Sharing] = weakref.WeakValueDictionary()
_lock = Lock()


def sharing_of(store: Store) -> Sharing:
    """Returns what all users of a place of chunks share in this process, also through several store objects.

    Keep it while it is in use.
    """
    place = place_of(store)
    with _lock:
        sharing = _known.get(place)
        if sharing is None:
            sharing = _known[place] = Sharing()
        return sharing
