"""The two-ended ledger: who computes which chunk, who loads which, and where they meet.

The main thread walks up from chunk 0, loader threads claim chunks from the back. Both sides share this one locked
object and nothing else.

    chunk      0      1      2      3      4      5      6      7
            computed   |   computing       loading   loaded ...
            main thread ->                            <- loader threads

Where they meet, both may work on one chunk: a loader that finds nothing else left loads the chunk that is being computed,
and the main thread may compute one that is being loaded. Whoever is done first wins. A chunk that may become contested
so is loaded *aside*, into memory of its own, since the place itself may be written to by the main thread.

Conservation law: every chunk is in exactly one `State`, so at any moment
`computed + computing + loaded + loading + failed + absent + waiting = all`, and a chunk is claimed by one side at a time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from types import TracebackType
from typing import Protocol

SECOND_THOUGHTS = 0.005
"""Seconds after which a waiting main thread asks again whether waiting is still the faster way."""


class State(Enum):
    """Where one chunk stands."""

    ABSENT = "absent"  # the store does not have it: only the main thread can make it
    WAITING = "waiting"  # in the store, claimed by nobody
    LOADING = "loading"  # claimed by a loader
    LOADED = "loaded"
    FAILED = "failed"  # a loader gave it up: only the main thread can make it
    COMPUTING = "computing"  # claimed by the main thread
    COMPUTED = "computed"


class Outcome(Enum):
    """How a load ended."""

    LOADED = "loaded"
    MISSED = "missed"  # listed a moment ago, gone now
    CORRUPT = "corrupt"
    ERROR = "error"
    LATE = "late"


class Strategy(str, Enum):
    """Which sides take part. BOTH is Cake; the other two are the single methods it is measured against."""

    BOTH = "both"
    COMPUTE = "compute"
    LOAD = "load"


class Changed(Protocol):
    """What the frontier needs of a `threading.Condition`."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...

    def wait(self, timeout: float | None = None) -> object:
        """Until notified, or for that many seconds of the frontier's clock."""

    def notify_all(self) -> None:
        """Wake up whoever waits."""


class Frontier:
    """Ledger of one restore. All methods may be called from any thread; `advance` only from the main one.

    Args:
        present: for each chunk, whether the store has it.
        strategy: BOTH; COMPUTE (loaders get nothing); LOAD (the main thread computes only what cannot be loaded).
        read_timeout: seconds after which a load that the main thread waits for is given up.
        near: how many chunks beyond the front are loaded aside and may be contested; 0 for no contest at all.
        most_aside: how many chunks may be on their way aside, or wait there to be put into place. A third of that is for the
            chunks nearest to the front, which always go aside; of the others, those go into place for which nothing is left.
        worth: called as `worth(chunk, loads_left, idle_seconds)` before a chunk is computed that could be loaded: False if the
            loads that are left would be there before its computation ends. Idle is the time since a load last began or ended.
        clock: monotonic seconds; replaceable for tests.
        changed: the lock, and what the main thread waits on; replaceable together with the clock. By default a new
            `threading.Condition`.
    """

    def __init__(
        self,
        present: Sequence[bool],
        *,
        strategy: Strategy = Strategy.BOTH,
        read_timeout: float = 10.0,
        near: int = 0,
        most_aside: int = 2**31,
        worth: Callable[[int, int, float], bool] = lambda chunk, loads_left, idle_seconds: True,
        clock: Callable[[], float] = time.monotonic,
        changed: Changed | None = None,
    ) -> None:
        loadable = strategy is not Strategy.COMPUTE
        self._states = [State.WAITING if has and loadable else State.ABSENT for has in present]
        self._stored = [has and loadable for has in present]
        self._outcomes: dict[int, Outcome] = {}
        self._strategy = strategy
        self._read_timeout = read_timeout
        self._near = near if strategy is Strategy.BOTH else 0
        self._most_aside = most_aside
        self._loads_left = self._states.count(State.WAITING)  # how many chunks are waiting or loading
        self._worth = worth
        self._clock = clock
        self._changed: Changed = threading.Condition() if changed is None else changed
        self._front = 0
        self._given_out: int | None = None  # the chunk that the main thread computes, even once a load has brought it
        self._back = len(self._states) - 1
        self._last_progress = clock()
        self._claimed_at: dict[int, float] = {}
        self._aside: dict[int, bool] = {}  # loads in flight; whether they land aside
        self._landed: list[int] = []  # loaded aside, not yet put into place
        self._open = True
        self._orphans = False
        self._left_behind = False

    # Loader side.

    def claim(self) -> int | None:
        """Give the caller the last chunk that nobody has taken, or None when there is nothing more to load."""
        with self._changed:
            if not self._open:
                return None
            while self._back >= 0 and self._states[self._back] is not State.WAITING:
                self._back -= 1
            if self._back >= 0:
                index = self._back
                self._aside[index] = self._goes_aside(index)
                self._turn(index, State.LOADING)
            elif self._can_be_contested(self._front):
                index = self._front
                self._aside[index] = True
            else:
                return None
            self._claimed_at[index] = self._last_progress = self._clock()
            self._changed.notify_all()
            return index

    def lands_aside(self, index: int) -> bool:
        """Whether a claimed chunk must be loaded into memory of its own; the main thread then puts it into place."""
        with self._changed:
            return self._aside.get(index, True)

    def settle(self, index: int, outcome: Outcome) -> bool:
        """Report how the load of a claimed chunk ended.

        Returns:
            False where the load was given up or overtaken meanwhile: then the loaded bytes are nobody's.
        """
        with self._changed:
            if index not in self._aside:
                return False
            if self._aside[index] and outcome is Outcome.LOADED:
                self._landed.append(index)
            self._finish(index, outcome)
            self._last_progress = self._clock()
            self._changed.notify_all()
            return True

    # Main thread.

    def advance(self) -> int | None:
        """Walk over what is already there and claim the next chunk to compute; None when the two sides have met.

        Blocks only while a load is the faster way (see `worth`) or the only safe one, and at most until that read's deadline;
        then all loads in flight are given up (see `take_orphans`). The chunk that it returns may be lost again (see `lost`).
        """
        with self._changed:
            self._given_out = None
            while self._front < len(self._states):
                state = self._states[self._front]
                if state in (State.LOADED, State.COMPUTED):
                    self._front += 1
                elif self._should_wait(self._front, state):
                    self._wait_for(self._front)
                else:
                    self._turn(self._front, State.COMPUTING)
                    self._given_out = self._front
                    return self._front
            return None

    def lost(self, index: int) -> bool:
        """Whether a chunk that `advance` gave out to be computed has arrived from the store meanwhile."""
        with self._changed:
            return self._states[index] is State.LOADED

    def computed(self, index: int) -> None:
        """Report that the main thread has made a chunk that `advance` gave it. That overtakes a load of the same chunk."""
        with self._changed:
            if index != self._given_out:
                raise RuntimeError(f"Chunk {index} is {self._states[index].value}, not computing.")
            self._given_out = None
            self._turn(index, State.COMPUTED)
            self._left_behind |= self._aside.pop(index, None) is not None
            if index in self._landed:
                self._landed.remove(index)
                del self._outcomes[index]

    def take_landed(self) -> list[int]:
        """Chunks that were loaded aside since the last call and are for the main thread to put into place."""
        with self._changed:
            landed, self._landed = self._landed, []
            return landed

    def left_behind(self) -> bool:
        """Whether a load was overtaken or given up, so that its thread may still be at it when all else is done."""
        with self._changed:
            return self._left_behind

    def take_orphans(self) -> bool:
        """Whether loads were given up since the last call. Their threads may still write to where they were told to."""
        with self._changed:
            orphans, self._orphans = self._orphans, False
            return orphans

    def stop(self) -> None:
        """End the restore early: nothing more is claimed and loads in flight are given up."""
        with self._changed:
            self._give_up()

    # Both.

    def counts(self) -> Counter[State]:
        """How many chunks are in each state."""
        with self._changed:
            return Counter(self._states)

    def outcomes(self) -> dict[int, Outcome]:
        """How each load that has ended did end, by chunk."""
        with self._changed:
            return dict(self._outcomes)

    # Called with the lock held.

    def _should_wait(self, index: int, state: State) -> bool:
        if not self._open or state not in (State.WAITING, State.LOADING):
            return state is State.LOADING
        if self._strategy is Strategy.LOAD or not self._aside.get(index, True):
            return True
        if self._near == 0:
            return state is State.LOADING
        return not self._worth(index, self._loads_left, self._clock() - self._last_progress)

    def _goes_aside(self, index: int) -> bool:
        if self._near == 0 or index > self._front + self._near:
            return False
        reserved = max(1, self._most_aside // 3)
        if index <= self._front + reserved:  # the front itself among them: these are at most `reserved + 1` at a time
            return True
        return sum(self._aside.values()) + len(self._landed) < self._most_aside - reserved - 1

    def _can_be_contested(self, index: int) -> bool:
        if self._near == 0 or index >= len(self._states) or index in self._aside or index in self._outcomes:
            return False
        return self._states[index] is State.COMPUTING and self._stored[index]

    def _wait_for(self, index: int) -> None:
        since = self._claimed_at.get(index, self._last_progress)
        remaining = since + self._read_timeout - self._clock()
        if remaining <= 0:
            self._give_up()
        else:
            # Where the main thread could also compute the chunk, it looks again now and then.
            self._changed.wait(min(remaining, SECOND_THOUGHTS) if self._near else remaining)

    def _give_up(self) -> None:
        self._open = False
        for index, aside in list(self._aside.items()):
            self._orphans |= not aside
            self._left_behind = True
            self._finish(index, Outcome.LATE)
        self._changed.notify_all()

    def _finish(self, index: int, outcome: Outcome) -> None:
        """A load has ended. A chunk that is also being computed stays with the main thread unless the load brought it."""
        del self._aside[index]
        self._outcomes[index] = outcome
        if outcome is Outcome.LOADED:
            self._turn(index, State.LOADED)
        elif self._states[index] is State.LOADING:
            self._turn(index, State.FAILED)

    def _turn(self, index: int, state: State) -> None:
        """Every change of a chunk's state, so that the loads that are left need not be counted each time."""
        to_load = (State.WAITING, State.LOADING)
        self._loads_left += (state in to_load) - (self._states[index] in to_load)
        self._states[index] = state
