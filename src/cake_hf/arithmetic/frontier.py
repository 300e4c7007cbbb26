"""The two-ended ledger: who computes which chunk, who loads which, and where they meet.

The main thread walks up from chunk 0, loader threads claim chunks from the back. Both sides share this one locked
object and nothing else.

    chunk      0      1      2      3      4      5      6      7
            computed   |   computing       loading   loaded ...
            main thread ->                            <- loader threads

Conservation law: every chunk is in exactly one `State`, so at any moment
`computed + computing + loaded + loading + failed + absent + waiting = all`, and a chunk is claimed by one side at a time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum


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


class Frontier:
    """Ledger of one restore. All methods may be called from any thread; `advance` only from the main one.

    Args:
        present: for each chunk, whether the store has it.
        strategy: BOTH; COMPUTE (loaders get nothing); LOAD (the main thread computes only what cannot be loaded).
        read_timeout: seconds after which a load that the main thread waits for is given up.
        clock: monotonic seconds; replaceable for tests.
    """

    def __init__(
        self,
        present: Sequence[bool],
        *,
        strategy: Strategy = Strategy.BOTH,
        read_timeout: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        loadable = strategy is not Strategy.COMPUTE
        self._states = [State.WAITING if has and loadable else State.ABSENT for has in present]
        self._outcomes: dict[int, Outcome] = {}
        self._strategy = strategy
        self._read_timeout = read_timeout
        self._clock = clock
        self._changed = threading.Condition()
        self._front = 0
        self._back = len(self._states) - 1
        self._last_progress = clock()
        self._claimed_at: dict[int, float] = {}
        self._open = True
        self._orphans = False

    # Loader side.

    def claim(self) -> int | None:
        """Give the caller the last chunk that nobody has taken, or None when there is nothing more to load."""
        with self._changed:
            if not self._open:
                return None
            while self._back >= 0 and self._states[self._back] is not State.WAITING:
                self._back -= 1
            if self._back < 0:
                return None
            index = self._back
            self._states[index] = State.LOADING
            self._claimed_at[index] = self._last_progress = self._clock()
            self._changed.notify_all()
            return index

    def settle(self, index: int, outcome: Outcome) -> bool:
        """Report how the load of a claimed chunk ended.

        Returns:
            False where the main thread has given the load up meanwhile: then the loaded bytes are nobody's.
        """
        with self._changed:
            if self._states[index] is not State.LOADING:
                return False
            self._finish(index, outcome)
            self._last_progress = self._clock()
            self._changed.notify_all()
            return True

    # Main thread.

    def advance(self) -> int | None:
        """Walk over what is already there and claim the next chunk to compute; None when the two sides have met.

        Blocks only for a chunk that a loader holds, and at most until that read's deadline; then all loads in
        flight are given up (see `take_orphans`).
        """
        with self._changed:
            while self._front < len(self._states):
                state = self._states[self._front]
                if state in (State.LOADED, State.COMPUTED):
                    self._front += 1
                elif self._must_wait(state):
                    self._wait_for(self._front)
                else:
                    self._states[self._front] = State.COMPUTING
                    return self._front
            return None

    def computed(self, index: int) -> None:
        """Report that the main thread has made a chunk that `advance` gave it."""
        with self._changed:
            if self._states[index] is not State.COMPUTING:
                raise RuntimeError(f"Chunk {index} is {self._states[index].value}, not computing.")
            self._states[index] = State.COMPUTED

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

    def _must_wait(self, state: State) -> bool:
        held_by_loader = state is State.LOADING
        left_to_loaders = state is State.WAITING and self._strategy is Strategy.LOAD and self._open
        return held_by_loader or left_to_loaders

    def _wait_for(self, index: int) -> None:
        since = self._claimed_at.get(index, self._last_progress)
        remaining = since + self._read_timeout - self._clock()
        if remaining <= 0:
            self._give_up()
        else:
            self._changed.wait(remaining)

    def _give_up(self) -> None:
        self._open = False
        for index, state in enumerate(self._states):
            if state is State.LOADING:
                self._finish(index, Outcome.LATE)
                self._orphans = True
        self._changed.notify_all()

    def _finish(self, index: int, outcome: Outcome) -> None:
        self._outcomes[index] = outcome
        self._states[index] = State.LOADED if outcome is Outcome.LOADED else State.FAILED
