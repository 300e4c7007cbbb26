"""The two-ended ledger: which chunks are computed, which are loaded, and where both sides meet.

The main thread walks up from chunk 0, and loader threads claim chunks from the back. Both sides share this one locked object
and nothing else.

    chunk      0      1      2      3      4      5      6      7
            computed   |   computing       loading   loaded ...
            main thread ->                            <- loader threads

Where they meet, both may work on one chunk: a loader that finds nothing else to load loads the chunk that is being computed,
and the main thread may compute a chunk that is being loaded. The side that finishes first wins. A chunk that may become
contested is therefore *staged*, loaded into memory of its own, since the main thread may write to its place.

If the main thread would rather wait than compute, nothing is contested, and loads may go in place (if they may be superseded
there). If such loads are late, the main thread leaves the place to them: it continues in other memory, the loads under way are
given up, and the rest is computed. Now and then the main thread computes a chunk although waiting seems better, to find out
whether it still is (`is_trial`); such a chunk may be given back (`give_back`).

What comes after the last loads need not wait for all of them: once every remaining load is under way, the main thread may go
beyond them (`advance(past_loads=True)`), and then waits in each layer only for that layer of the loads (`await_layer`).

Conservation law: every chunk is in exactly one `State`, so
`computed + computing + loaded + loading + failed + absent + waiting = all` at any moment, and a chunk is claimed by one side at
a time.
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
"""Seconds after which a waiting main thread checks again whether waiting is still faster."""


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


class Judge:
    """Decides between computing and waiting, and is notified of events. This base class always computes and contests nothing.

    All methods are called with the frontier's lock held; `now` is a time of the frontier's clock.
    """

    def loading(self, now: float) -> None:
        """Notes that a load has started."""

    def loaded(self, now: float) -> None:
        """Notes that a load has arrived."""

    def near(self, now: float) -> int:
        """Returns how many chunks beyond the front may be contested, and are staged for that; 0 for no contest at all."""
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

    def may_be_worth(self, chunk: int, loads_left: int, now: float) -> bool:
        """Returns whether computing the chunk may become worth it before the loads arrive.

        If not, the loads go in place, where the main thread must not write.
        """
        return True

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        """Returns whether to compute the chunk although that is not worth it: see `Frontier.is_trial`."""
        return False

    def overdue(self, chunk: int, loads_left: int, now: float) -> bool:
        """Returns whether to supersede loads that go in place. All loads under way are then given up, and none starts."""
        return False


class Changed(Protocol):
    """What the frontier needs of a `threading.Condition`."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...

    def wait(self, timeout: float | None = None) -> object:
        """Waits until notified, or for that many seconds of the frontier's clock."""

    def notify_all(self) -> None:
        """Wakes up all waiting threads."""


class Frontier:
    """Ledger of one restore. All methods may be called from any thread; `advance` only from the main thread.

    Args:
        present: for each chunk, whether the store has it.
        strategy: BOTH; COMPUTE (loaders get nothing); LOAD (the main thread computes only what cannot be loaded).
        read_timeout: seconds after which a load that the main thread waits for is given up.
        most_staged: maximum number of staged chunks, including those still being loaded, that are not committed yet.
        nearest: how many of these are reserved for the chunks nearest to the front, which are staged whenever they may be
            contested. Other chunks go in place if no room for staging remains.
        restage: called with the lock held if the main thread is given a chunk to compute whose load is on its way into place:
            from then on the load is staged, in full. No load then needs to be staged beforehand. None if a load on its way into
            place cannot be redirected.
        last: number of chunks that count as the last to be loaded, whose layers are waited for.
        judge: asked before a chunk is computed that could be loaded, and while a load is waited for.
        supersedes_in_place: whether loads that go in place may be superseded (see `take_abandoned`). If not, such loads are
            waited for until the deadline, and loads near the front are always staged.
        clock: monotonic seconds; replaceable for tests.
        changed: the lock, and the condition that the main thread waits on; replaceable together with the clock. By default a
            new `threading.Condition`.
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
        self._given_out: set[int] = set()  # computed by the main thread, even after a load has delivered it
        self._trial: int | None = None
        self._last = last
        self._beyond = 0  # the chunk at which the main thread is beyond the loads; earlier ones may still be loading
        self._layers_there: dict[int, int] = {}  # delivered by loads in flight
        self._back = len(self._states) - 1
        self._last_progress = clock()
        self._claimed_at: dict[int, float] = {}
        self._staged: dict[int, bool] = {}  # loads in flight -> whether they are staged
        self._arrived_staged: list[int] = []  # staged, not yet committed
        self._open = True
        self._abandoned = False
        self._left_behind = False

    # Loader side.

    def claim(self) -> int | None:
        """Claims the last unclaimed chunk for the caller; None if there is nothing more to load."""
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
        """Returns whether no load of that chunk ever started."""
        with self._changed:
            return index not in self._claimed_at

    def has_claims(self) -> bool:
        """Returns whether `claim` would return a chunk now."""
        with self._changed:
            return self._open and (self._waiting > 0 or self._can_be_contested(self._front))

    def is_staged(self, index: int) -> bool:
        """Returns whether a claimed chunk must be loaded into memory of its own, for the main thread to commit."""
        with self._changed:
            return self._staged.get(index, True)

    def comes_last(self, index: int) -> bool:
        """Returns whether a claimed chunk is among the last to be loaded, so that it is best delivered layer by layer.

        No chunk is while the main thread may start another one: reads in parts share the path with concurrent reads, which may
        be of chunks that the main thread reaches first.
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
        """Reports that the first `layers` layers of a claimed chunk have arrived."""
        with self._changed:
            if index in self._staged:
                self._layers_there[index] = layers
                self._changed.notify_all()

    def settle(self, index: int, outcome: Outcome) -> bool:
        """Reports how the load of a claimed chunk ended.

        Returns:
            False if the load was given up or superseded meanwhile: the loaded bytes are then dropped.
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
        """Walks over the chunks that are already there and claims the next chunk to compute; None when the two sides have met.

        Blocks only while a load is faster (see `worth` and `overdue`) or is the only safe way, and at most until that read's
        deadline; then all loads in flight are given up (see `take_abandoned`). The returned chunk may be preempted later (see
        `preempted`).

        Args:
            until: the walk ends before this chunk; by default after the last one.
            past_loads: instead of waiting for loads that are all under way, return what comes after them: a chunk that no
                loader will load, or None at the end. A caller that continues there must call `await_layer` before it uses a
                layer of these chunks.
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
        """Blocks until this layer has arrived for all chunks that the main thread went beyond.

        Returns:
            False if the load of one of them failed, or if the chunk is now better computed: the caller must then repeat the
                walk up to where it is, `advance(until=...)`, before anything else.
        """
        with self._changed:
            while (index := self._first_without(layer)) is not None:
                if self._states[index] is not State.LOADING or not self._should_wait(index, State.LOADING):
                    return False
                self._wait_for(index)
            return True

    def arriving(self, layer: int) -> list[int]:
        """Returns those chunks that the main thread went beyond whose loads are under way and have delivered this layer.

        Chunks that it has computed meanwhile are excluded, although their loads may still be under way: those loads are
        superseded.
        """
        with self._changed:
            return [
                index
                for index in range(self._front, self._beyond)
                if self._states[index] is State.LOADING and self._layers_there.get(index, 0) > layer
            ]

    def beyond(self) -> int:
        """Returns the chunk at which the main thread went beyond the loads (the chunk count if at the end), or 0."""
        with self._changed:
            return self._beyond

    def is_trial(self, index: int) -> bool:
        """Returns whether a chunk was given out only to measure the cost of computing, and may be given back (`give_back`)."""
        with self._changed:
            return index == self._trial

    def give_back(self, index: int) -> None:
        """Takes back a chunk whose forward the main thread ended before the chunk arrived: it can be loaded as before."""
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
        """Returns whether a chunk that was given out on trial turns out to be worth computing."""
        with self._changed:
            if self._states[index] is State.COMPUTING and not self._is_worth(index):
                return False
            self._trial = None
            return True

    def preempted(self, index: int) -> bool:
        """Returns whether a chunk that `advance` gave out for computing has arrived from the store meanwhile."""
        with self._changed:
            return self._states[index] is State.LOADED

    def computed(self, index: int) -> None:
        """Reports that the main thread has computed a chunk that `advance` gave out. Supersedes a load of the same chunk."""
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
        """Returns the chunks that were staged since the last call and are ready for the main thread to commit.

        Excludes a chunk that the main thread is computing: the forward that writes to its place must be preempted or finished
        first.
        """
        with self._changed:
            landed = [index for index in self._arrived_staged if index not in self._given_out]
            self._arrived_staged = [index for index in self._arrived_staged if index in self._given_out]
            return landed

    def left_behind(self) -> bool:
        """Returns whether a load was superseded or given up, so that its thread may still be busy when all else is done."""
        with self._changed:
            return self._left_behind

    def take_abandoned(self) -> bool:
        """Returns whether loads were given up, or superseded in place, since the last call.

        Their threads may still write to their destinations.
        """
        with self._changed:
            abandoned, self._abandoned = self._abandoned, False
            return abandoned

    def close(self) -> None:
        """Allows no more claims. Loads in flight may still arrive."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def end(self) -> None:
        """Ends the restore and drops the callables, which keep it alive.

        Freeing the KV then waits neither for the garbage collector nor for a load that hangs.
        """
        with self._changed:
            self._open = False
            self._judge, self._supersedes_in_place, self._restage = Judge(), False, None

    def stop(self) -> None:
        """Ends the restore early: allows no more claims and gives up loads in flight."""
        with self._changed:
            self._give_up(Outcome.LATE)

    # Both.

    def counts(self) -> Counter[State]:
        """Returns how many chunks are in each state."""
        with self._changed:
            return Counter(self._states)

    def outcomes(self) -> dict[int, Outcome]:
        """Returns the outcome of each load that has ended, by chunk."""
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
        """Asks the judge. Whether the chunk itself is already being computed does not affect the answer."""
        left = self._loads_left + (self._states[index] is State.COMPUTING and self._stored[index])
        if whole is None:
            whole = self._states[index] is State.LOADING and index not in self._layers_there
        return self._judge.worth(index, left, self._clock(), whole=whole)

    def _tries(self, index: int, state: State) -> bool:
        can_be_given_back = self._near() > 0 and not self._is_in_place(index)
        return can_be_given_back and self._judge.tries(index, self._loads_left, self._clock())

    def _is_in_place(self, index: int) -> bool:
        """Returns whether a load goes in place, so that no other thread may write there."""
        return not self._staged.get(index, True)

    def _clear_place(self, index: int) -> None:
        """Prepares for the main thread to write to the destination of a load that is under way."""
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
        """Returns the chunk after the loads if all of them are under way; None if some are still unclaimed."""
        there = (State.LOADED, State.COMPUTED, State.LOADING)
        after = next(
            (i for i in range(self._front, len(self._states)) if self._states[i] not in there), len(self._states)
        )
        waiting = after < len(self._states) and self._states[after] is State.WAITING
        return None if waiting or not self._open else after

    def _first_without(self, layer: int) -> int | None:
        """Returns the first chunk, of those that the main thread went beyond, for which this layer has not arrived."""
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
            return False  # no contest: a staged chunk would be copied for nothing
        if index < self._front + self._nearest:  # including the front itself: that many at a time
            return True
        return sum(self._staged.values()) + len(self._arrived_staged) < self._most_staged - self._nearest

    def _can_be_contested(self, index: int) -> bool:
        if self._near() == 0 or index >= len(self._states) or index in self._staged or index in self._outcomes:
            return False
        if self._layers_there:  # this load would share the path with one in parts
            return False
        return self._states[index] is State.COMPUTING and self._stored[index]

    def _wait_for(self, index: int) -> None:
        since = self._claimed_at.get(index, self._last_progress)
        remaining = since + self._read_timeout - self._clock()
        if remaining <= 0:
            self._give_up(Outcome.LATE)
        else:
            # The main thread reconsiders now and then if it could also compute the chunk.
            self._changed.wait(min(remaining, SECOND_THOUGHTS) if self._near() else remaining)

    def _give_up(self, outcome: Outcome | None) -> None:
        """Gives up all loads under way, wherever they land; without an outcome, they count as never started."""
        self._open = False
        for index, staged in list(self._staged.items()):
            self._abandoned |= not staged
            self._left_behind = True
            self._finish(index, outcome)
        self._changed.notify_all()

    def _finish(self, index: int, outcome: Outcome | None) -> None:
        """Ends a load. A chunk that is also being computed stays with the main thread unless the load delivered it."""
        del self._staged[index]
        self._layers_there.pop(index, None)
        if outcome is not None:
            self._outcomes[index] = outcome
        if outcome is Outcome.LOADED:
            self._turn(index, State.LOADED)
        elif self._states[index] is State.LOADING:
            self._turn(index, State.FAILED)

    def _turn(self, index: int, state: State) -> None:
        """Changes a chunk's state. All changes go through here, so that the remaining loads need not be counted each time."""
        self._waiting += (state is State.WAITING) - (self._states[index] is State.WAITING)
        to_load = (State.WAITING, State.LOADING)
        self._loads_left += (state in to_load) - (self._states[index] in to_load)
        self._states[index] = state

    def _renew(self) -> None:
        """Replaces the lock in a forked child. The loaders do not exist there: what they had claimed never arrives and is not
        waited for."""
        self._changed, self._read_timeout = threading.Condition(), 0.0
