"""The two-ended ledger: who computes which chunk, who loads which, and where they meet.

The main thread walks up from chunk 0, loader threads claim chunks from the back. Both sides share this one locked
object and nothing else.

    chunk      0      1      2      3      4      5      6      7
            computed   |   computing       loading   loaded ...
            main thread ->                            <- loader threads

Where they meet, both may work on one chunk: a loader that finds nothing else left loads the chunk that is being computed,
and the main thread may compute one that is being loaded. Whoever is done first wins. A chunk that may become contested
so is loaded *aside*, into memory of its own, since the place itself may be written to by the main thread.

Where the main thread would rather wait than compute, nothing is contested, and loads may go into place (where they may be
overtaken there). Should they be late, the main thread leaves them the place: it goes on in other memory, loads under way are
given up, and the rest is computed. Now and then it computes a chunk although waiting seems better, to find out whether that is
still so (`is_trial`); such a chunk may be given back (`give_back`).

What comes after the last loads need not wait for all of them: once every load that is left is under way, the main thread may
go beyond them (`advance(past_loads=True)`), and waits in each layer only for that layer of them (`await_layer`).

Conservation law: every chunk is in exactly one `State`, so at any moment
`computed + computing + loaded + loading + failed + absent + waiting = all`, and a chunk is claimed by one side at a time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum, StrEnum
from types import TracebackType
from typing import Protocol

from cake_hf.util.forks import renewed_in_child

SECOND_THOUGHTS = 0.005
"""Seconds after which a waiting main thread asks again whether waiting is still the faster way."""


class State(Enum):
    """Where one chunk stands."""

    ABSENT = "absent"  # the store does not have it: only the main thread can make it
    WAITING = "waiting"  # in the store, claimed by nobody
    LOADING = "loading"  # claimed by a loader
    LOADED = "loaded"
    FAILED = "failed"  # given up, or left in its place: only the main thread can make it
    COMPUTING = "computing"  # claimed by the main thread
    COMPUTED = "computed"


class Outcome(Enum):
    """How a load ended."""

    LOADED = "loaded"
    MISSED = "missed"  # listed a moment ago, gone now
    CORRUPT = "corrupt"
    ERROR = "error"
    LATE = "late"


class Strategy(StrEnum):
    """Which sides take part. BOTH is Cake; the other two are the single methods it is measured against."""

    BOTH = "both"
    COMPUTE = "compute"
    LOAD = "load"


class Judge:
    """What decides between computing and waiting, and is told what happens. This one always computes, and contests nothing.

    All methods are called with the frontier's lock held; `now` is of the frontier's clock.
    """

    def loading(self, now: float) -> None:
        """A load was begun."""

    def loaded(self, now: float) -> None:
        """A load has arrived."""

    def near(self, now: float) -> int:
        """How many chunks beyond the front may be contested, and are loaded aside for that; 0 for no contest at all."""
        return 0

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        """Whether to compute that chunk, which could be loaded, rather than to wait for the loads that are left.

        Args:
            chunk: at the front.
            loads_left: it among them.
            now: by the clock.
            whole: its load is under way, and does not bring one layer after the other.
        """
        return True

    def may_be_worth(self, chunk: int, loads_left: int, now: float) -> bool:
        """Whether it may become so before they are there. If not, they go into place, where it must not write."""
        return True

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        """Whether to compute it although that is not worth it: see `Frontier.is_trial`."""
        return False

    def overdue(self, chunk: int, loads_left: int, now: float) -> bool:
        """Whether to overtake loads that go into place. All that are under way are then left where they are, and none begun."""
        return False


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
        most_staged: how many chunks may be on their way aside, or wait there to be put into place.
        nearest: how many of these are for the chunks nearest to the front, which go aside wherever they may be contested. Of
            the others, those go into place for which nothing is left.
        restage: called, with the lock held, with a chunk on its way into place that the main thread is given to compute:
            what comes of it lands aside from now on, and in full. So no load need go aside before. None: what is on its way
            into place cannot be turned.
        last: how many chunks are the last ones to be loaded, whose layers are waited for.
        judge: asked before a chunk is computed that could be loaded, and while a load is waited for.
        supersedes_in_place: whether loads that go into place may be overtaken (see `take_abandoned`). If not, such loads are
            waited for until the deadline, and the loads near the front always go aside.
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
        most_staged: int = 2**31,
        nearest: int = 1,
        restage: Callable[[int], None] | None = None,
        last: int = 0,
        judge: Judge | None = None,
        supersedes_in_place: bool = False,
        clock: Callable[[], float] = time.monotonic,
        changed: Changed | None = None,
    ) -> None:
        loadable = strategy is not Strategy.COMPUTE
        self._states = [State.WAITING if has and loadable else State.ABSENT for has in present]
        self._stored = [has and loadable for has in present]
        self._outcomes: dict[int, Outcome] = {}
        self._strategy = strategy
        self._read_timeout = read_timeout
        self._most_staged = most_staged
        self._nearest = nearest
        self._restage = restage
        self._waiting = self._loads_left = self._states.count(State.WAITING)  # loads left: waiting or loading
        self._judge = judge or Judge()
        self._supersedes_in_place = supersedes_in_place
        self._clock = clock
        self._changed: Changed = threading.Condition() if changed is None else changed
        if changed is None:
            renewed_in_child(self._renew)
        self._front = 0
        self._given_out: set[int] = set()  # what the main thread computes, even once a load has brought it
        self._trial: int | None = None
        self._last = last
        self._beyond = (
            0  # the main thread is beyond the loads, at this chunk; those before it may still be on their way
        )
        self._layers_there: dict[int, int] = {}  # of loads in flight
        self._back = len(self._states) - 1
        self._last_progress = clock()
        self._claimed_at: dict[int, float] = {}
        self._staged: dict[int, bool] = {}  # loads in flight; whether they land aside
        self._arrived_staged: list[int] = []  # loaded aside, not yet put into place
        self._open = True
        self._abandoned = False
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
                self._staged[index] = self._is_to_be_staged(index)
                self._turn(index, State.LOADING)
            elif self._can_be_contested(self._front):
                index = self._front
                self._staged[index] = True
            else:
                return None
            self._claimed_at[index] = self._last_progress = now = self._clock()
            self._judge.loading(now)
            self._changed.notify_all()
            return index

    def is_untouched(self, index: int) -> bool:
        """Whether no load of that chunk was ever begun."""
        with self._changed:
            return index not in self._claimed_at

    def has_claims(self) -> bool:
        """Whether `claim` would give something now."""
        with self._changed:
            return self._open and (self._waiting > 0 or self._can_be_contested(self._front))

    def is_staged(self, index: int) -> bool:
        """Whether a claimed chunk must be loaded into memory of its own; the main thread then puts it into place."""
        with self._changed:
            return self._staged.get(index, True)

    def comes_last(self, index: int) -> bool:
        """Whether a claimed chunk is among the last ones to be loaded, so that its layers are best brought one after the other.

        As long as the main thread may begin another chunk, none is: reads in parts share the path with those beside them, which
        may be of chunks that it comes to first.
        """
        with self._changed:
            front = self._front
            if front < len(self._states) and self._states[front] is State.COMPUTING:
                front += 1
            nothing_left = front == len(self._states)
            waits = self._strategy is not Strategy.BOTH or nothing_left or not self._is_worth(front, whole=False)
            last = waits and index < front + self._last
            if last and index in self._staged:
                self._layers_there[index] = 0
            return last

    def landed(self, index: int, layers: int) -> None:
        """Report that the first so many layers of a claimed chunk are there."""
        with self._changed:
            if index in self._staged:
                self._layers_there[index] = layers
                self._changed.notify_all()

    def settle(self, index: int, outcome: Outcome) -> bool:
        """Report how the load of a claimed chunk ended.

        Returns:
            False where the load was given up or overtaken meanwhile: then the loaded bytes are nobody's.
        """
        with self._changed:
            if outcome is Outcome.LOADED and self._open:
                self._judge.loaded(self._clock())
            if index not in self._staged:
                return False
            if self._staged[index] and outcome is Outcome.LOADED:
                self._arrived_staged.append(index)
            self._finish(index, outcome)
            self._last_progress = self._clock()
            self._changed.notify_all()
            return True

    # Main thread.

    def advance(self, *, until: int | None = None, past_loads: bool = False) -> int | None:
        """Walk over what is already there and claim the next chunk to compute; None when the two sides have met.

        Blocks only while a load is the faster way (see `worth` and `overdue`) or the only safe one, and at most until that
        read's deadline; then all loads in flight are given up (see `take_abandoned`). The chunk that it returns may be lost
        again (see `preempted`).

        Args:
            until: the walk ends before this chunk; by default after the last one.
            past_loads: rather than to wait for loads that are all under way, return what comes after them: a chunk that
                nobody loads, or None at the end. Whoever goes on there must `await_layer` before it uses a layer of them.
        """
        with self._changed:
            end = len(self._states) if until is None else until
            self._beyond = 0
            while self._front < end:
                state = self._states[self._front]
                if state in (State.LOADED, State.COMPUTED):
                    self._given_out.discard(self._front)
                    self._front += 1
                elif not self._should_wait(self._front, state):
                    if self._is_in_place(self._front):
                        self._clear_place(self._front)
                    return self._give_out(self._front)
                elif past_loads and (after := self._after_loads()) is not None:
                    self._beyond = after
                    return self._give_out(after) if after < end else None
                elif self._tries(self._front, state):
                    self._trial = self._front
                    return self._give_out(self._front)
                else:
                    self._wait_for(self._front)
            return None

    def await_layer(self, layer: int) -> bool:
        """Block until this layer of all chunks is there that the main thread went beyond.

        Returns:
            False where one of them has failed, or is better computed now: then the walk to where the main thread is has to be
            done again, `advance(until=...)`, before anything else.
        """
        with self._changed:
            while (index := self._first_without(layer)) is not None:
                if self._states[index] is not State.LOADING or not self._should_wait(index, State.LOADING):
                    return False
                self._wait_for(index)
            return True

    def arriving(self, layer: int) -> list[int]:
        """Of the chunks that the main thread went beyond, those whose loads are under way and have brought this layer.

        Not those that it has computed meanwhile, although their loads may still be under way: these are nobody's.
        """
        with self._changed:
            return [
                index
                for index in range(self._front, self._beyond)
                if self._states[index] is State.LOADING and self._layers_there.get(index, 0) > layer
            ]

    def beyond(self) -> int:
        """The chunk that the main thread went to beyond the loads (all chunks, if to the end); 0 if it did not."""
        with self._changed:
            return self._beyond

    def is_trial(self, index: int) -> bool:
        """Whether a chunk was given out only to find out what computing costs, and may be given back (`give_back`)."""
        with self._changed:
            return index == self._trial

    def give_back(self, index: int) -> None:
        """The main thread has left a forward on a chunk that has not arrived: it can be loaded as before."""
        with self._changed:
            self._given_out.discard(index)
            self._trial = None
            if self._states[index] is not State.COMPUTING:
                return
            if index in self._staged:
                self._turn(index, State.LOADING)
            else:
                self._turn(index, State.FAILED if index in self._outcomes or not self._stored[index] else State.WAITING)
                self._back = max(self._back, index)
            self._changed.notify_all()

    def goes_on(self, index: int) -> bool:
        """Whether a chunk that was given out on trial turns out to be worth computing."""
        with self._changed:
            if self._states[index] is State.COMPUTING and not self._is_worth(index):
                return False
            self._trial = None
            return True

    def preempted(self, index: int) -> bool:
        """Whether a chunk that `advance` gave out to be computed has arrived from the store meanwhile."""
        with self._changed:
            return self._states[index] is State.LOADED

    def computed(self, index: int) -> None:
        """Report that the main thread has made a chunk that `advance` gave it. That overtakes a load of the same chunk."""
        with self._changed:
            if index not in self._given_out:
                raise RuntimeError(f"Chunk {index} is {self._states[index].value}, not computing.")
            self._given_out.remove(index)
            self._turn(index, State.COMPUTED)
            self._left_behind |= self._staged.pop(index, None) is not None
            self._layers_there.pop(index, None)
            if index in self._arrived_staged:
                self._arrived_staged.remove(index)
            if self._outcomes.get(index) is Outcome.LOADED:
                del self._outcomes[index]

    def take_staged(self) -> list[int]:
        """Chunks that were loaded aside since the last call and are for the main thread to put into place.

        Not one that it is computing: a forward that writes to that place is left, or done, before.
        """
        with self._changed:
            landed = [index for index in self._arrived_staged if index not in self._given_out]
            self._arrived_staged = [index for index in self._arrived_staged if index in self._given_out]
            return landed

    def left_behind(self) -> bool:
        """Whether a load was overtaken or given up, so that its thread may still be at it when all else is done."""
        with self._changed:
            return self._left_behind

    def take_abandoned(self) -> bool:
        """Whether loads were given up, or overtaken in place, since the last call.

        Their threads may still write to where they were told to.
        """
        with self._changed:
            abandoned, self._abandoned = self._abandoned, False
            return abandoned

    def close(self) -> None:
        """Nothing more is claimed. What is in flight may still come."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def end(self) -> None:
        """The restore is over. The callables, which hold it, are let go: KV waits for no collector and no load that hangs."""
        with self._changed:
            self._open = False
            self._judge, self._supersedes_in_place, self._restage = Judge(), False, None

    def stop(self) -> None:
        """End the restore early: nothing more is claimed and loads in flight are given up."""
        with self._changed:
            self._give_up(Outcome.LATE)

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
        if state is not State.LOADING and (state is not State.WAITING or not self._open):
            return False
        if self._strategy is Strategy.LOAD:
            return True
        if self._is_in_place(index) and self._restage is None:
            return not self._supersedes_in_place or not self._judge.overdue(index, self._loads_left, self._clock())
        if self._near() == 0:
            return state is State.LOADING
        return not self._is_worth(index)

    def _near(self) -> int:
        return self._judge.near(self._clock()) if self._strategy is Strategy.BOTH else 0

    def _is_worth(self, index: int, *, whole: bool | None = None) -> bool:
        """Of the chunk itself it does not matter whether it is being computed already."""
        left = self._loads_left + (self._states[index] is State.COMPUTING and self._stored[index])
        if whole is None:
            whole = self._states[index] is State.LOADING and index not in self._layers_there
        return self._judge.worth(index, left, self._clock(), whole=whole)

    def _tries(self, index: int, state: State) -> bool:
        can_be_given_back = self._near() > 0 and not self._is_in_place(index)
        return can_be_given_back and self._judge.tries(index, self._loads_left, self._clock())

    def _is_in_place(self, index: int) -> bool:
        """Whether a load goes into place, so that nobody else may write there."""
        return not self._staged.get(index, True)

    def _clear_place(self, index: int) -> None:
        """The main thread is going to write where a load is on its way to."""
        if self._restage is None:
            self._give_up(None)
        else:
            self._restage(index)
            self._staged[index] = True

    def _give_out(self, index: int) -> int:
        self._turn(index, State.COMPUTING)
        self._given_out.add(index)
        return index

    def _after_loads(self) -> int | None:
        """What comes after loads that are all under way; None if there are some that nobody has claimed."""
        there = (State.LOADED, State.COMPUTED, State.LOADING)
        after = next(
            (i for i in range(self._front, len(self._states)) if self._states[i] not in there), len(self._states)
        )
        waiting = after < len(self._states) and self._states[after] is State.WAITING
        return None if waiting or not self._open else after

    def _first_without(self, layer: int) -> int | None:
        """The first chunk, of those that the main thread went beyond, of which this layer is not there."""
        there = (State.LOADED, State.COMPUTED)
        return next(
            (
                index
                for index in range(self._front, self._beyond)
                if self._states[index] not in there and self._layers_there.get(index, 0) <= layer
            ),
            None,
        )

    def _is_to_be_staged(self, index: int) -> bool:
        near = self._near()
        if near == 0 or index > self._front + near or self._restage is not None:
            return False
        undecided = self._supersedes_in_place and self._states[self._front] in (State.WAITING, State.LOADING)
        if undecided and not self._judge.may_be_worth(self._front, self._loads_left, self._clock()):
            return False  # there is no contest: what went aside would be copied for nothing
        if index < self._front + self._nearest:  # the front itself among them: as many at a time
            return True
        return sum(self._staged.values()) + len(self._arrived_staged) < self._most_staged - self._nearest

    def _can_be_contested(self, index: int) -> bool:
        if self._near() == 0 or index >= len(self._states) or index in self._staged or index in self._outcomes:
            return False
        if self._layers_there:  # a load in parts would share the path with this one
            return False
        return self._states[index] is State.COMPUTING and self._stored[index]

    def _wait_for(self, index: int) -> None:
        since = self._claimed_at.get(index, self._last_progress)
        remaining = since + self._read_timeout - self._clock()
        if remaining <= 0:
            self._give_up(Outcome.LATE)
        else:
            # Where the main thread could also compute the chunk, it looks again now and then.
            self._changed.wait(min(remaining, SECOND_THOUGHTS) if self._near() else remaining)

    def _give_up(self, outcome: Outcome | None) -> None:
        """Nobody waits any more for what is under way, wherever it lands; with no outcome it is as if it had not been begun."""
        self._open = False
        for index, staged in list(self._staged.items()):
            self._abandoned |= not staged
            self._left_behind = True
            self._finish(index, outcome)
        self._changed.notify_all()

    def _finish(self, index: int, outcome: Outcome | None) -> None:
        """A load has ended. A chunk that is also being computed stays with the main thread unless the load brought it."""
        del self._staged[index]
        self._layers_there.pop(index, None)
        if outcome is not None:
            self._outcomes[index] = outcome
        if outcome is Outcome.LOADED:
            self._turn(index, State.LOADED)
        elif self._states[index] is State.LOADING:
            self._turn(index, State.FAILED)

    def _turn(self, index: int, state: State) -> None:
        """Every change of a chunk's state, so that the loads that are left need not be counted each time."""
        self._waiting += (state is State.WAITING) - (self._states[index] is State.WAITING)
        to_load = (State.WAITING, State.LOADING)
        self._loads_left += (state in to_load) - (self._states[index] in to_load)
        self._states[index] = state

    def _renew(self) -> None:
        """In a child the loaders are not there: what they had claimed does not come, and is not waited for."""
        self._changed, self._read_timeout = threading.Condition(), 0.0
