"""What the restores of one process share that use one place of chunks: a budget of reads, and the chunks they make.

Prompts that run at the same time often begin alike. A chunk that one of them loads or computes is not loaded or computed a
second time beside it: the others wait for it and copy it (single flight). Equal keys mean equal KV, so no bit depends on it.
Nobody waits for ever: waits have bounds, and whoever waits in vain does the work itself. Nor in a circle: who computes a chunk
waits only for chunks before it, who loads one for nobody.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from cake_hf.stores.base import Store

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
        self._lock = threading.Lock()
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
            if payload is not None and self._followers:
                self._payload = payload()
            self._ended.set()


class ReadSlot:
    """A place among the reads that may be under way; given back once, by whoever comes first."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back
        self._lock = threading.Lock()

    def release(self) -> None:
        """May be called more than once."""
        with self._lock:
            give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class Sharing:
    """Get it from `sharing_of`. Invariants: at most as many reads are under way as the least generous reader allows at its
    beginning; of each key there is at most one flight on the board.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a cache that is collected while its thread holds it abandons its flights
        self._changed = threading.Condition(self._lock)
        self._reads = 0
        self._board: dict[str, Flight] = {}

    def reads(self) -> int:
        """How many reads are under way."""
        with self._lock:
            return self._reads

    def begin_read(self, limit: int, until: Callable[[], bool]) -> ReadSlot | None:
        """Wait for a place among at most `limit` reads; None if meanwhile `until()` says that it is not needed any more.

        `until` is asked whenever a read ends, and after `wake`.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._reads < limit or until())
            if until():
                return None
            self._reads += 1
        return ReadSlot(self._end_read)

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

    def _end_read(self) -> None:
        with self._lock:
            self._reads -= 1
            self._changed.notify_all()


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
_lock = threading.Lock()


def sharing_of(store: Store) -> Sharing:
    """What all users of a place of chunks share in this process, also through several store objects. Keep it while in use."""
    with _lock:
        identity = store.identity()
        sharing = _known.get(identity)
        if sharing is None:
            sharing = _known[identity] = Sharing()
        return sharing
