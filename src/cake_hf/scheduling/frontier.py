"""The two-ended ledger: which chunks are computed, which are loaded, and where both sides meet.

The main thread walks up from chunk 0, and loader threads claim chunks from the back. What each side may do is
decided by this one locked object.

    chunk      0      1      2      3      4      5      6      7
            computed   |   computing       loading   loaded ...
            main thread ->                            <- loader threads

One number decides about each load before it starts, its *slack*: how many times as long as believed it may take and still
arrive before the main thread has computed the chunk (`Judge.slack`).

- Slack below 1: the load would come too late, so no loader claims it. It may be claimed later, if beliefs change or if the
  main thread finds that waiting is faster: a loader that has nothing to claim waits (`await_claim`) until every stored chunk
  has been claimed or computed.
- Slack below HEDGE: the load is *staged*, read into memory of its own, because the main thread may come to write to the
  chunk's place. If the load is late, the main thread computes the chunk; the side that finishes first wins.
- Otherwise the load goes in place, where only its loader may write. The main thread waits for it, up to its deadline.

Where costs are not known, everything is loaded, and staged as long as there is room; a loader that finds nothing else to load
loads the chunk that is being computed.

A chunk may be computed on trial, to find out whether waiting is still better (`is_trial`), and given back (`give_back`). What
comes after the last loads need not wait for all of them: once every remaining load is under way, the main thread may go
beyond them (`advance(past_loads=True)`), and `layer_gate.LayerGate` then waits in each layer only for that layer of the loads.

Conservation law: at any moment every chunk is in exactly one `State`, and a chunk is claimed by one side at a time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from cake_hf.scheduling.costs import Brought
from cake_hf.scheduling.ledger import THERE, Changed, Judge, Ledger, Outcome, State, Strategy
from cake_hf.util.forks import renewed_in_child

__all__ = ["HEDGE", "Frontier", "Judge", "Outcome", "State", "Strategy"]

SECOND_THOUGHTS = 0.005
"""Seconds after which a waiting main thread checks again whether waiting is still faster."""

HEDGE = 8.0
"""A load is staged if the main thread would reach its chunk first, should the load take this many times as long as believed.

Fewer staged loads save copies. More of them let the main thread compute on when loads become that much slower.
"""


class Frontier(Ledger):
    """Ledger of one restore. All methods may be called from any thread; `advance` only from the main thread.

    Args:
        present: for each chunk, whether the store has it.
        strategy: BOTH; COMPUTE (loaders get nothing); LOAD (the main thread computes only what cannot be loaded).
        read_timeout: seconds after which a load that the main thread waits for is given up.
        most_staged: maximum number of staged chunks, including those still being loaded, that are not committed yet. Further
            loads go in place.
        judge: asked before a chunk is loaded, before one is computed that could be loaded, and while a load is waited for.
        clock: monotonic seconds, by default `time.monotonic`; replaceable for tests.
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
        judge: Judge | None = None,
        clock: Callable[[], float] | None = None,
        changed: Changed | None = None,
    ) -> None:
        super().__init__([has and strategy is not Strategy.COMPUTE for has in present], most_staged, changed)
        self._strategy = strategy
        self._read_timeout = read_timeout
        self._judge = judge or Judge()
        self._clock = clock or time.monotonic
        if changed is None:
            renewed_in_child(self._renew)
        self._front = 0
        self._given_out: set[int] = set()  # computed by the main thread, even after a load has delivered it
        self._waits = False  # the main thread would rather wait for loads than compute
        self._refused = False  # a loader found no load that would arrive in time
        self._trial: int | None = None
        self._last_progress = self._clock()
        self._open = True

    # Loader side.

    def claim(self) -> int | None:
        """Claims the last unclaimed chunk for the caller; None if there is nothing to load, at least not now."""
        with self._changed:
            index = self._claimable()
            if index is None:
                return None
            self._last_progress = now = self._clock()
            self._loads.start(index, now, staged=self._is_to_be_staged(index), form=self._form_of_next(now))
            if self._states[index] is State.WAITING:
                self._states.turn(index, State.LOADING)
            self._judge.loading(now)
            self._changed.notify_all()
            return index

    def await_claim(self) -> bool:
        """Blocks until there is a chunk to claim; False once there never will be one again.

        That is so when every stored chunk has been claimed or computed: no chunk is claimed twice. So no loader ends that might
        still be needed, and none waits longer than the main thread computes.
        """
        with self._changed:
            while self._claimable() is None:
                if not self._may_be_claimed_later():
                    return False
                self._changed.wait()
            return True

    def has_claims(self) -> bool:
        """Returns whether `claim` would return a chunk now."""
        with self._changed:
            return self._claimable() is not None

    def comes_in_parts(self, index: int, last: int) -> bool:
        """Returns whether a claimed chunk is best delivered layer by layer: it is among the `last` ones to be loaded.

        No chunk is while the main thread may start another one: reads in parts share the path with concurrent reads, which may
        be of chunks that the main thread reaches first.
        """
        with self._changed:
            front = self._front + self._states.is_computing(self._front)
            may_compute = self._strategy is Strategy.BOTH and front < len(self._states)
            if index >= front + last or (may_compute and self._is_worth(front, whole=False)):
                return False
            self._loads.in_parts.add(index)
            return True

    def notify(self) -> None:
        """Makes the main thread check again what it waits for."""
        with self._changed:
            self._changed.notify_all()

    def settle(self, index: int, outcome: Outcome, brought: Brought | None = None) -> bool:
        """Reports how the load of a claimed chunk ended.

        Returns:
            False if the load was given up or superseded meanwhile: the loaded bytes are then dropped.
        """
        with self._changed:
            if outcome is Outcome.LOADED and self._open:
                self._judge.loaded(self._clock(), brought)
            if index not in self._loads:
                return False
            if outcome is Outcome.LOADED and brought is not None and brought.is_rounded:
                self._loads.inexact.add(index)
            self._finish(index, outcome)
            self._last_progress = self._clock()
            self._changed.notify_all()
            return True

    # Main thread.

    def advance(self, *, until: int | None = None, past_loads: bool = False) -> int | None:
        """Walks over the chunks that are already there and claims the next chunk to compute; None when the two sides have met.

        Blocks only while a load is faster (see `worth`) or goes in place, and at most until that read's deadline; then all
        loads in flight are given up (see `take_abandoned`). The returned chunk may be preempted later (see `preempted`).

        Args:
            until: the walk ends before this chunk; by default after the last one.
            past_loads: instead of waiting for loads that are all under way, return what comes after them: a chunk that no
                loader will load, or None at the end. A caller that continues there must wait for each layer of these chunks
                before it uses that layer: see `LayerGate`.
        """
        with self._changed:
            end = len(self._states) if until is None else until
            while self._pass_over(end):
                state = self._states[self._front]
                if not self._should_wait(self._front, state):
                    return self._give_out(self._front)
                if past_loads and self._open and (after := self._states.after_loads(self._front)) is not None:
                    return self._give_out(after) if after < end else None
                if self._tries(self._front):
                    self._rather_wait()
                    self._trial = self._front
                    return self._give_out(self._front)
                self._wait_for(self._front)
            return None

    def missing(self, before: int) -> list[int]:
        """Returns the chunks before that one which are not there, and which the main thread has therefore gone beyond."""
        with self._changed:
            return self._states.missing(self._front, before)

    def await_load(self, index: int, enough: Callable[[], bool]) -> bool:
        """Blocks until a chunk that the main thread went beyond is there, or enough of it while its load is under way.

        Returns:
            False if the load failed, or if the chunk is now better computed: the caller must then repeat the walk up to where
                it is, `advance(until=...)`, before anything else.
        """
        with self._changed:
            while (state := self._states[index]) is State.LOADING and not enough():
                if not self._should_wait(index, state):
                    return False
                self._wait_for(index)
            return state is State.LOADING or state in THERE

    def is_trial(self, index: int) -> bool:
        """Returns whether a chunk was given out only to measure the cost of computing, and may be given back (`give_back`)."""
        with self._changed:
            return index == self._trial

    def give_back(self, index: int) -> None:
        """Takes back a chunk whose forward the main thread ended before the chunk arrived: it can be loaded as before."""
        with self._changed:
            self._given_out.discard(index)
            self._trial = None
            self._changed.notify_all()
            if self._states[index] is not State.COMPUTING:
                return
            if index in self._loads:
                self._states.turn(index, State.LOADING)
            else:
                failed = index in self._loads.outcomes or not self._states.is_stored(index)
                self._states.turn(index, State.FAILED if failed else State.WAITING)

    def goes_on(self, index: int) -> bool:
        """Returns whether a chunk that was given out on trial turns out to be worth computing."""
        with self._changed:
            if self._states[index] is State.COMPUTING and not self._is_worth(index):
                return False
            self._trial, self._waits = None, False
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
            self._states.turn(index, State.COMPUTED)
            self._loads.supersede(index)
            if any(before < index for before in self._loads.inexact):
                self._loads.inexact.add(index)
            self._changed.notify_all()

    def take_staged(self) -> list[int]:
        """Returns the chunks that were staged since the last call and are ready for the main thread to commit.

        Excludes a chunk that the main thread is computing: the forward that writes to its place must be preempted or finished
        first.
        """
        with self._changed:
            return self._loads.take_arrived(self._given_out)

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
            self._judge = Judge()
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends the restore early: allows no more claims and gives up loads in flight."""
        with self._changed:
            self._give_up()

    # Called with the lock held.

    def _pass_over(self, end: int) -> bool:
        """Moves the front over the chunks that are there; returns whether it is still before chunk `end`."""
        front = self._states.first_missing(self._front, end)
        self._given_out.difference_update(range(self._front, front))
        self._front = front
        return front < end

    def _claimable(self) -> int | None:
        """Returns the chunk to load next: the last unclaimed one, or else the one that is being computed."""
        if not self._open:
            return None
        if (index := self._states.last_waiting()) is None and (index := self._contested()) is None:
            return None
        if not self._waits and self._slack(index) < 1:
            self._refused = True
            if not self._loads:
                self._judge.paused()
            return None
        return index

    def _contested(self) -> int | None:
        index = self._front
        if self._loads.share_in_parts():  # this load would share the path with one in parts
            return None
        return index if self._is_computed_unclaimed(index) and self._is_to_be_staged(index) else None

    def _may_be_claimed_later(self) -> bool:
        return self._open and (self._states.waiting > 0 or self._is_computed_unclaimed(self._front))

    def _is_computed_unclaimed(self, index: int) -> bool:
        """Returns whether a chunk is being computed that is stored, and that no loader has ever claimed."""
        computing = self._states.is_computing(index)
        return computing and self._states.is_stored(index) and self._loads.started_at(index) is None

    def _slack(self, index: int) -> float:
        if self._strategy is not Strategy.BOTH:
            return math.inf
        front = self._states.first_missing(self._front, index)
        return self._judge.slack(front, index, len(self._loads) + 1, self._clock())

    def _form_of_next(self, now: float) -> int:
        next_computed = self._front + self._states.is_computing(self._front)
        return self._judge.form(next_computed if self._strategy is Strategy.BOTH else None, self._states.to_load, now)

    def _is_to_be_staged(self, index: int) -> bool:
        may_be_reached = math.inf if self._states[index] is State.COMPUTING else HEDGE
        return self._loads.has_room(index - self._front) and self._slack(index) < may_be_reached

    def _should_wait(self, index: int, state: State) -> bool:
        if state is not State.LOADING and (state is not State.WAITING or not self._open):
            return False
        return not self._has_choice(index) or not self._is_worth(index)

    def _has_choice(self, index: int) -> bool:
        """Returns whether the main thread may compute a chunk that can be loaded: not where a load in place may write."""
        return self._strategy is Strategy.BOTH and self._loads.is_staged(index)

    def _is_worth(self, index: int, *, whole: bool | None = None) -> bool:
        """Asks the judge. Whether the chunk itself is already being computed does not affect the answer."""
        left = self._states.to_load + (self._states[index] is State.COMPUTING and self._states.is_stored(index))
        if whole is None:
            whole = self._states[index] is State.LOADING and index not in self._loads.in_parts
        return self._judge.worth(index, left, self._clock(), whole=whole)

    def _tries(self, index: int) -> bool:
        return self._has_choice(index) and self._judge.tries(index, self._states.to_load, self._clock())

    def _rather_wait(self) -> None:
        """Lets the loaders claim everything: the main thread will not compute before they have brought it."""
        if not self._waits and self._refused:
            self._last_progress = self._clock()
            self._changed.notify_all()
        self._waits, self._refused = True, False

    def _give_out(self, index: int) -> int:
        self._states.turn(index, State.COMPUTING)
        self._given_out.add(index)
        self._waits = index == self._trial
        return index

    def _wait_for(self, index: int) -> None:
        self._rather_wait()
        started = self._loads.started_at(index)
        remaining = (self._last_progress if started is None else started) + self._read_timeout - self._clock()
        if remaining <= 0:
            self._give_up()
        else:
            # The main thread reconsiders now and then if it could also compute the chunk.
            self._changed.wait(min(remaining, SECOND_THOUGHTS) if self._has_choice(index) else remaining)

    def _give_up(self) -> None:
        """Gives up all loads under way, wherever they land: they are late."""
        self._open = False
        for index in self._loads.give_up():
            self._finish(index, Outcome.LATE)
        self._changed.notify_all()

    def _finish(self, index: int, outcome: Outcome) -> None:
        """Ends a load. A chunk that is also being computed stays with the main thread unless the load delivered it."""
        self._loads.end(index, outcome)
        if outcome is Outcome.LOADED:
            self._states.turn(index, State.LOADED)
        elif self._states[index] is State.LOADING:
            self._states.turn(index, State.FAILED)

    def _renew(self) -> None:
        """Replaces the lock in a forked child. The loaders do not exist there: what they had claimed never arrives and is not
        waited for."""
        self._changed, self._read_timeout = threading.Condition(), 0.0
