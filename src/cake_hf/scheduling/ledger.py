"""The record of a restore's chunks and loads, the lock that its two sides share, and the interface of the rules.

`Frontier` changes it.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Container, Sequence
from enum import Enum, StrEnum
from types import TracebackType
from typing import Protocol

from cake_hf.scheduling.costs import Brought


class State(Enum):
    """State of one chunk."""

    ABSENT = "absent"  # not in the store: only the main thread can make it
    WAITING = "waiting"  # in the store, unclaimed
    LOADING = "loading"  # claimed by a loader
    LOADED = "loaded"
    FAILED = "failed"  # the load failed or was given up: only the main thread can make it
    COMPUTING = "computing"  # claimed by the main thread
    COMPUTED = "computed"


class Outcome(Enum):
    """How a load ended."""

    LOADED = "loaded"
    MISSED = "missed"  # listed by the prefix match, gone now
    CORRUPT = "corrupt"
    ERROR = "error"
    LATE = "late"


class Strategy(StrEnum):
    """Which sides take part. BOTH is Cake; the other two are the single methods that it is compared with."""

    BOTH = "both"
    COMPUTE = "compute"
    LOAD = "load"

    @classmethod
    def _missing_(cls, value: object) -> Strategy:
        raise ValueError(f"strategy {value!r} is unknown; choose one of {', '.join(cls)}.")


class Judge:
    """Knows what computing and loading cost (see `pace.Pace`), and is notified of events.

    This base class always computes and contests nothing.

    All methods are called with the frontier's lock held; `now` is a time of the frontier's clock.
    """

    def loading(self, now: float) -> None:
        """Notes that a load has started."""

    def loaded(self, now: float, brought: Brought | None = None) -> None:
        """Notes that a load has arrived, and what it brought if that is known."""

    def paused(self) -> None:
        """Notes that no load is under way because none is worth starting."""

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        """Returns how many times as long as believed a load may take and still arrive before its chunk is computed.

        At least 1 if a cost is not known; infinite if nothing is to be contested.

        Args:
            front: the first chunk that is not there, at which the main thread is.
            chunk: to be loaded, at the front or after it.
            loads: number of loads that will then be under way, including this one.
            now: by the clock.
        """
        return math.inf

    def form(self, front: int | None, left: int, now: float) -> int:
        """Returns the form in which a chunk is to be loaded: 0 for the finest, in which it is stored.

        Args:
            front: the first chunk that is not there; None if the main thread computes only what cannot be loaded.
            left: number of remaining loads, including this one.
            now: by the clock.
        """
        return 0

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        """Returns whether to compute a chunk that could be loaded, rather than to wait for the remaining loads.

        Args:
            chunk: the chunk at the front.
            loads_left: number of remaining loads, including this chunk.
            now: by the clock.
            whole: whether the chunk's load is under way and does not deliver it layer by layer.
        """
        return True

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        """Returns whether to compute the chunk although that is not worth it: see `Frontier.is_trial`."""
        return False


THERE = (State.LOADED, State.COMPUTED)
TO_LOAD = (State.WAITING, State.LOADING)


class ChunkStates:
    """The states of a restore's chunks. Used under the frontier's lock.

    Args:
        stored: for each chunk, whether it can be loaded.

    Attributes:
        waiting: number of chunks that no loader has claimed yet.
        to_load: number of these and of those that are being loaded.
    """

    def __init__(self, stored: Sequence[bool]) -> None:
        self._stored = list(stored)
        self._states = [State.WAITING if has else State.ABSENT for has in stored]
        self._back = len(self._states) - 1  # no chunk after it is waiting
        self.waiting = self.to_load = sum(self._stored)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: int) -> State:
        return self._states[index]

    def turn(self, index: int, state: State) -> None:
        """Changes a chunk's state. All changes go through here, so that nothing needs to be counted each time."""
        before, self._states[index] = self._states[index], state
        self.waiting += (state is State.WAITING) - (before is State.WAITING)
        self.to_load += (state in TO_LOAD) - (before in TO_LOAD)
        if state is State.WAITING:
            self._back = max(self._back, index)

    def count(self) -> Counter[State]:
        """Returns how many chunks are in each state."""
        return Counter(self._states)

    def is_stored(self, index: int) -> bool:
        """Returns whether a chunk can be loaded."""
        return self._stored[index]

    def is_computing(self, index: int) -> bool:
        """Returns whether a chunk is being computed; False after the last chunk."""
        return index < len(self._states) and self._states[index] is State.COMPUTING

    def first_missing(self, start: int, end: int) -> int:
        """Returns the first chunk from `start` on, and before `end`, that is not there; `end` if all are."""
        return next((index for index in range(start, end) if self[index] not in THERE), max(start, end))

    def missing(self, begin: int, end: int) -> list[int]:
        """Returns the chunks in that range which are not there."""
        return [index for index in range(begin, end) if self._states[index] not in THERE]

    def last_waiting(self) -> int | None:
        """Returns the last chunk that no loader has claimed."""
        while self._back >= 0 and self._states[self._back] is not State.WAITING:
            self._back -= 1
        return self._back if self._back >= 0 else None

    def after_loads(self, begin: int) -> int | None:
        """Returns the first chunk from `begin` on that is neither there nor being loaded; None if it waits for a loader."""
        for index in range(begin, len(self._states)):
            state = self._states[index]
            if state is not State.LOADING and state not in THERE:
                return None if state is State.WAITING else index
        return len(self._states)


class Loads:
    """The loads of a restore; used under the frontier's lock. `len` is the number under way; `in` says if a chunk's load is.

    Attributes:
        outcomes: how each load has ended, by chunk; not of those that were superseded.
        in_parts: chunks whose loads deliver layer by layer.
        inexact: chunks whose KV is not exact: they were loaded in rounded form, or computed behind such ones.
        abandoned: loads in place were given up, so that their threads may still write there.
        left_behind: a load was superseded or given up, so that its thread may still be busy when all else is done.
    """

    def __init__(self, most_staged: int) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.in_parts: set[int] = set()
        self.inexact: set[int] = set()
        self.abandoned = False
        self.left_behind = False
        self._most_staged = most_staged
        self._started_at: dict[int, float] = {}
        self._staged: dict[int, bool] = {}  # under way -> whether staged
        self._forms: dict[int, int] = {}
        self._arrived: list[int] = []  # staged, not yet committed

    def __len__(self) -> int:
        return len(self._staged)

    def __contains__(self, index: int) -> bool:
        return index in self._staged

    def start(self, index: int, now: float, *, staged: bool, form: int) -> None:
        """Records that a load starts."""
        self._started_at[index] = now
        self._staged[index] = staged
        self._forms[index] = form

    def form(self, index: int) -> int:
        """Returns the form in which a claimed chunk is to be loaded."""
        return self._forms[index]

    def started_at(self, index: int) -> float | None:
        """Returns when a chunk's load started; None if it never did."""
        return self._started_at.get(index)

    def is_staged(self, index: int) -> bool:
        """Returns whether the load of a chunk is staged; True if none is under way."""
        return self._staged.get(index, True)

    def share_in_parts(self) -> bool:
        """Returns whether a load under way delivers layer by layer."""
        return not self.in_parts.isdisjoint(self._staged)

    def has_room(self, ahead: int) -> bool:
        """Returns whether another chunk may be staged, `ahead` chunks before the front.

        A third of the room is kept for the chunks nearest to the front, which are loaded last and most likely superseded.
        """
        kept = min(ahead, self._most_staged // 3)
        return sum(self._staged.values()) + len(self._arrived) < self._most_staged - kept

    def end(self, index: int, outcome: Outcome) -> None:
        """Records how a load ended."""
        if self._staged.pop(index) and outcome is Outcome.LOADED:
            self._arrived.append(index)
        self.outcomes[index] = outcome

    def supersede(self, index: int) -> None:
        """Drops a chunk's load, because the main thread has computed the chunk."""
        self.left_behind |= self._staged.pop(index, None) is not None
        if index in self._arrived:
            self._arrived.remove(index)
        if self.outcomes.get(index) is Outcome.LOADED:
            del self.outcomes[index]
            self.inexact.discard(index)

    def give_up(self) -> list[int]:
        """Marks what is under way as left behind; returns these chunks."""
        self.left_behind |= bool(self._staged)
        self.abandoned |= not all(self._staged.values())
        return list(self._staged)

    def take_arrived(self, excluded: Container[int]) -> list[int]:
        """Returns the staged chunks that have arrived since the last call, except for the excluded ones."""
        taken = [index for index in self._arrived if index not in excluded]
        self._arrived = [index for index in self._arrived if index in excluded]
        return taken


class Changed(Protocol):
    """The methods of `threading.Condition` that the frontier uses."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...

    def wait(self, timeout: float | None = None) -> object:
        """Waits until notified, or for that many seconds of the frontier's clock."""

    def notify_all(self) -> None:
        """Wakes up all waiting threads."""


class Ledger:
    """The part of the frontier that any thread may ask.

    Args:
        stored: for each chunk, whether it can be loaded.
        most_staged: see `Frontier`.
        changed: see `Frontier`.
    """

    def __init__(self, stored: Sequence[bool], most_staged: int, changed: Changed | None) -> None:
        self._changed: Changed = threading.Condition() if changed is None else changed
        self._states = ChunkStates(stored)
        self._loads = Loads(most_staged)

    def ask(self, question: Callable[[], bool]) -> bool:
        """Returns the answer to a question to the judge, which late loads still tell when they arrive."""
        with self._changed:
            return question()

    def is_untouched(self, index: int) -> bool:
        """Returns whether no load of that chunk ever started."""
        with self._changed:
            return self._loads.started_at(index) is None

    def is_wanted(self, index: int) -> bool:
        """Returns whether the load of a chunk is under way, and was neither superseded nor given up."""
        with self._changed:
            return index in self._loads

    def is_staged(self, index: int) -> bool:
        """Returns whether a claimed chunk must be loaded into memory of its own, for the main thread to commit."""
        with self._changed:
            return self._loads.is_staged(index)

    def form(self, index: int) -> int:
        """Returns the form in which a claimed chunk is to be loaded, see `Judge.form`."""
        with self._changed:
            return self._loads.form(index)

    def exact_until(self) -> int:
        """Returns the number of the first chunk that is not exact; of chunks before it, all that are there are exact."""
        with self._changed:
            return min(self._loads.inexact, default=len(self._states))

    def rounded(self) -> list[int]:
        """Returns the chunks that were loaded in rounded form and not refined since, in order."""
        with self._changed:
            ends = self._loads.outcomes
            return sorted(index for index in self._loads.inexact if ends.get(index) is Outcome.LOADED)

    def refined(self, index: int) -> None:
        """Records that a chunk that was loaded in rounded form has become exact."""
        with self._changed:
            self._loads.inexact.remove(index)

    def left_behind(self) -> bool:
        """Returns whether a load was superseded or given up, so that its thread may still be busy when all else is done."""
        with self._changed:
            return self._loads.left_behind

    def take_abandoned(self) -> bool:
        """Returns whether loads in place were given up since the last call. Their threads may still write there."""
        with self._changed:
            abandoned, self._loads.abandoned = self._loads.abandoned, False
            return abandoned

    def counts(self) -> Counter[State]:
        """Returns how many chunks are in each state."""
        with self._changed:
            return self._states.count()

    def outcomes(self) -> dict[int, Outcome]:
        """Returns the outcome of each load that has ended, by chunk."""
        with self._changed:
            return dict(self._loads.outcomes)
