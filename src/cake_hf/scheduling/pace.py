"""Beliefs of one restore about the speed of its two sides, and the rules by which the main thread acts on them.

The costs learnt from earlier prompts are a start, and this restore's measurements correct them: the chunks that the main thread
computes yield one common factor on the believed compute time, and the loads that arrive yield another. A machine that has
become slower or faster since, or becomes so in the middle of a restore, is thus followed within a chunk. Pure arithmetic: no
clock, no threads.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cake_hf.blocks import Block
from cake_hf.scheduling.costs import MAX_SECONDS, Brought, ComputeCost, Costs, LoadCost
from cake_hf.scheduling.frontier import Judge
from cake_hf.scheduling.layer_gate import ranges_of

TRIAL_SHARE = 0.02
"""Fraction of the restores' time that may be spent on trials of the unused side."""

BESIDE_LOADS = 0.2
"""Seconds that a second of computing is assumed to take from the loads. Loads from a network or a disk lose next to nothing; if
both sides compete for the same cores or memory, it may be half, and trials then cost up to 5 % instead of 2 %."""

LATE = 8.0
"""A load that is late by x is expected to take this many times x more. Computing in vain is cheap: the forward is preempted
when the load arrives."""


class Pace(Judge):
    """The costs of one restore as currently believed. Used under the frontier's lock, except `saw_forward`: main thread only.

    The rule: compute the chunk at the front if that finishes before all remaining loads have arrived. With true costs this
    gives the best split; the proof is in `worth`.

    *Trials.* While the rule says to wait, nothing would reveal that computing has become cheaper. But a waiting main thread has
    nothing else to do, and a forward can be ended after each layer. So the main thread starts the chunk anyway; after one layer
    it knows what a layer takes and asks the rule again. That is a trial. If the belief was right, the trial costs the part of
    that layer's time that is taken from the loads (`BESIDE_LOADS`), plus whatever lasts beyond them. A trial is made once its
    price is earned: as `TRIAL_SHARE` of the time of all restores since the last one. As long as the beliefs hold, all trials
    together thus cost at most 2 % of all restores. If computing a chunk is believed to be k times as expensive as loading all,
    it is tried in one restore out of `k * BESIDE_LOADS / (TRIAL_SHARE * layers)`: in every restore up to k = 3.2 with 32
    layers.

    Args:
        costs: as learnt.
        first: index on the absolute grid of the restore's chunk 0.
        chunks: number of chunks in the restore.
        layers: number of layers in the model; a forward can be ended after each.
        threads: number of loader threads.
        following_seconds: time that what comes after the loads takes by itself.
        ranges: number of layer ranges in which each of the last chunks is read; 1 hides nothing.
        credit: seconds of restores since the last trial.
        quiet: the fraction of the chunks' time, in the measurements that the costs were learnt from, that other processes on
            the machine left to them. A trial is meant to find out whether these are gone, so its price is calculated without
            them.

    Attributes:
        steps: index on the absolute grid, and seconds, of the chunks that the main thread has measured.
        credit: as given, plus this restore's time once it has ended.
        lateness: if no load has arrived, a lower bound of the factor by which loads took longer than believed.
        shares: the fraction of each step's time that other processes on the machine left to it.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        first: int = 0,
        chunks: int = 1,
        layers: int = 1,
        threads: int = 1,
        following_seconds: float = 0.0,
        ranges: int = 1,
        credit: float = 0.0,
        quiet: float = 1.0,
    ) -> None:
        self._compute = costs.compute
        self._load = costs.load
        self._first = first
        self._chunks = chunks
        self._layers = layers
        self._threads = threads
        self._following = following_seconds
        self._ranges = ranges
        self.credit = credit
        self._factor = 1.0  # on the believed compute time
        self._began: float | None = None  # when loading started
        self._arrivals: list[
            float
        ] = []  # when it started, or went on after a pause, and when each load since has ended
        self._before = 1.0  # the lateness of loads before the pause
        self._any_arrived = False
        self.steps: list[tuple[int, float]] = []
        self.lateness = 1.0
        self.shares: list[float] = []
        self._quiet = quiet

    # What happened.

    def loading(self, now: float) -> None:
        """Notes that a load has started."""
        if self._began is None:
            self._began = now
        if not self._arrivals:
            self._arrivals.append(now)

    def loaded(self, now: float, brought: Brought | None = None) -> None:
        """Notes that a load has arrived."""
        self._any_arrived = True
        if self._arrivals:
            self._arrivals.append(now)

    def paused(self) -> None:
        """Notes that no load is under way because none is worth starting. Until the next one starts, none is late."""
        if self._load is not None and self._arrivals:
            self._before = self._past(self._load)
            self._arrivals.clear()

    def saw_forward(self, chunk: int, seconds: float, share: float = 1.0, *, worked: float | None = None) -> None:
        """Records that a chunk, or the given share of it, was computed.

        Args:
            chunk: index in the restore.
            seconds: time it took.
            share: computed fraction of the chunk's layers.
            worked: the part of these seconds in which the thread had a processor; None if that is not known.
        """
        if not (0 < share <= 1 and 0 <= seconds <= MAX_SECONDS):
            return
        if worked is not None and 0 < worked <= seconds:
            self.shares.append(worked / seconds)
        index, whole = self._first + chunk, min(seconds / share, MAX_SECONDS)
        if self.steps and self.steps[-1][0] == index:
            self.steps.pop()  # it was the time of the first layers
        self.steps.append((index, whole))
        if self._compute is None:
            self._compute = ComputeCost(whole)
        believed = self._compute.seconds(index)
        self._factor = whole / believed if believed > 0 else 1.0

    # What to do.

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        """Returns whether to compute the chunk now, rather than to wait for the loads. True if a cost is not known.

        False in two cases: if all remaining loads would arrive no later than the compute step ends, or if the sides would meet
        no sooner than the loads arrive, less the hidden part of their time.

        Proof that the first condition is optimal when the costs hold. Let chunk i be stored, F(i) the time to compute all
        chunks before it, L(i) the time at which all loads of chunks i.. would have arrived, H(i) the time of the holes in i..,
        and `T(m) = max(F(m), L(m)) + H(m)` as in `planner.plan`. The rule continues while `F(i + 1) < L(i)` and stops at the
        first stored i with `F(i + 1) >= L(i)`: it takes T(i). (1) m > i: all of F(i + 1) and the holes are computed, so
        `T(m) >= F(m) + H(m) >= F(i + 1) + H(i + 1) >= T(i)`. (2) m < i: `T(m) >= L(m) + H(m) >= L(i) + H(i)`; and with j the
        last stored chunk before i, whose step was started, `F(i) + H(i) = F(j + 1) + H(j) < L(j) + H(j) <= T(m)`. Hence
        `T(i) = min T`: as fast as the best split, and never slower than computing all, T(n), or loading all, T(0).

        This holds if a chunk may be computed although a loader holds it. If such a chunk has to be waited for instead, at most
        one interval is lost: its load was under way, so `L(i) <= F(i) + interval`, while every split takes at least
        F(i) + H(i), see (1) and (2).

        If the compute costs g that the rule believes in are not the true f, the result is still within one step of the optimum
        (true loads, no holes): `T <= T* + max(f_0.., g_0..)`. Let the rule stop at i, so `T = max(F(i), L(i))`. It waits only
        if `L(i) <= F(i) + g_i`, and it started the step before at `F(i - 1) < L(i - 1)`, so `F(i) < L(i - 1) + f_(i-1)`; while
        every split takes at least `min(F(i), L(i - 1))`. In the same way it is at most one true step slower than loading all.

        If loads stop arriving, the rule waits at most `g_i / LATE` longer than the next ones should have taken, provided that
        it is asked again meanwhile.
        """
        wait = self._wait(loads_left, now)
        if wait is None or self._compute is None or self._began is None:
            return True
        if not self._seconds(chunk) < wait:
            return False
        hidden = 0.0 if whole else self._hidden()
        return hidden == 0 or self._meeting(chunk, loads_left, now) < wait - hidden

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        """Returns how many times as long as believed a load may take and still arrive before its chunk is computed.

        1 if a cost is not known: then the load is started, and it may be late. So it is for the first load of a restore, which
        measures what loading takes now.

        Proof that not to start loads with a slack below 1 loses nothing when the costs hold. Let F be the time at which the
        main thread has computed all chunks up to this one, L that at which the loads under way have arrived, and L' >= L that
        at which this load would, so F < L'. Without it the sides meet at max(F, L), which is less than L' or equal to L. With
        it they meet when it has arrived or F is over, whichever is sooner, but not before L: no sooner than max(F, L).
        """
        wait = self._wait(loads, now)
        if wait is None or self._compute is None:
            return 1.0
        slack = self._compute_seconds(front, chunk - front + 1) / wait if wait > 0 else math.inf
        return slack if self._any_arrived else max(1.0, slack)

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        """Returns whether to start a chunk that is not worth computing, to find out whether that is true."""
        wait = self._wait(loads_left, now)
        # The very last loads may arrive layer by layer, which a concurrent trial would prevent.
        if wait is None or self._compute is None or self._began is None:
            return False
        if self._layers < 2 or loads_left <= self._threads:
            return False
        layer = self._quiet * self._seconds(chunk) / self._layers
        price = BESIDE_LOADS * min(layer, wait) + max(0.0, layer - wait)
        restore = now - self._began + wait
        if price > TRIAL_SHARE * (self.credit + restore):
            return False
        self.credit = -restore
        return True

    def end(self, now: float) -> None:
        """Ends the restore."""
        if self._began is None:
            return
        self.credit += now - self._began
        if not self._any_arrived:
            self.lateness = max(1.0, self._lateness(now))

    # What is believed.

    def _seconds(self, chunk: int) -> float:
        assert self._compute is not None
        return self._factor * self._compute.seconds(self._first + chunk)

    def _compute_seconds(self, first: int, count: int) -> float:
        """Returns the seconds to compute so many chunks, from `first` on."""
        assert self._compute is not None
        middle = self._compute.base + self._compute.slope * (self._first + first + (count - 1) / 2)
        return self._factor * count * middle

    def _hidden(self) -> float:
        """Returns the seconds of the loads' time that are hidden by reading the last chunks in ranges of layers.

        What follows (computing the prompt's suffix, or the hole behind the loads) starts when each thread is at its last chunk,
        and runs through a layer as soon as that layer of these chunks has arrived. It therefore ends when both it and the loads
        are done, except for the last range: of the shorter of the two, all but `1 / ranges` is hidden.
        """
        if self._load is None:
            return 0.0
        return min(self._following, self._threads * self._load.interval) * (1 - 1 / self._ranges)

    def _meeting(self, chunk: int, left: int, now: float) -> float:
        """Returns the seconds until the two sides meet: `min over m of max(f_0 + ... + f_(m-1), L(left - m))`, found by
        bisection."""

        def ends(computed: int) -> tuple[float, float]:
            return self._compute_seconds(chunk, computed), self._wait(left - computed, now) or 0.0

        def have_met(computed: int) -> bool:
            front, back = ends(computed)
            return front >= back

        at = bisect_left(range(left), True, key=have_met)
        return min(max(ends(at)), max(ends(max(0, at - 1))))

    def _wait(self, left: int, now: float) -> float | None:
        """Returns the seconds until all remaining loads have arrived; None if nothing is known about that.

        By the load model they take `finish(done + left) - finish(done)` from the last arrival on, multiplied by their lateness.
        A load that is late is expected to take another `LATE` times that delay.
        """
        load, done = self._load, len(self._arrivals) - 1
        if load is None or left < 1:
            return None
        if done < 0:
            return self._before * load.finish(left)
        idle = now - self._arrivals[-1]
        late = idle - self._past(load) * (load.finish(done + min(left, self._threads)) - load.finish(done))
        return max(self._lateness(now) * (load.finish(done + left) - load.finish(done)) - idle, LATE * late, 0.0)

    def _lateness(self, now: float) -> float:
        """Returns the factor by which loads now take longer than believed. An awaited load counts as soon as it is late."""
        load, done = self._load, len(self._arrivals) - 1
        if load is None or done < 0:
            return self._before
        start = max(0, done - self._threads)
        due = load.finish(done + self._threads) - load.finish(start)
        return max(self._past(load), (now - self._arrivals[start]) / due if due > 0 else 0.0)

    def _past(self, load: LoadCost) -> float:
        """Returns the lateness by the last arrivals only: one per thread, as these may arrive together or in sequence."""
        done = len(self._arrivals) - 1
        start = max(0, done - self._threads)
        if done < 1 or load.finish(done) <= load.finish(start):
            return self._before
        took = self._arrivals[done] - self._arrivals[start]
        at_most = took / (load.finish(done) - load.finish(start))
        at_least = took / (load.finish(max(done, self._threads)) - load.finish(start))
        return min(max(self._before, at_least), at_most) if done < self._threads else at_most


class RestorePace(Pace):
    """The pace of one restore of a cache.

    Attributes:
        can_run: whether a block could be computed right now; if not, skipping the wait for its load gains nothing.
        can_leave: whether a forward on it can be ended although its load has not arrived.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        blocks: Sequence[Block],
        can_run: Callable[[int], bool],
        can_leave: Callable[[int], bool],
        **beliefs: Any,
    ) -> None:
        super().__init__(costs, **beliefs)
        self.blocks, self.can_run, self.can_leave = blocks, can_run, can_leave

    def end(self, now: float) -> None:
        """Ends the restore, and drops the references to it, since it holds KV."""
        super().end(now)
        self.can_run = self.can_leave = _never

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        slack = super().slack(front, chunk, loads, now)
        return max(1.0, slack) if any(block.singly for block in self.blocks[front : chunk + 1]) else slack

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        if not self.can_run(chunk):
            return False
        if self.blocks[chunk].singly:  # takes one forward per token, so only if the loads are very late
            wait = self._wait(loads_left, now)
            return wait is None or self._compute is None or self.blocks[chunk].tokens * self._seconds(chunk) < wait
        return super().worth(chunk, loads_left, now, whole=whole)

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        return self.can_leave(chunk) and super().tries(chunk, loads_left, now)


def _never(chunk: int) -> bool:
    return False


@dataclass(frozen=True)
class Rules:
    """The rules by which a cache's restores load or compute a chunk, and read it. Tests replace them.

    Attributes:
        pace: makes the pace of each restore.
        ranges: chooses the number of layer ranges in which the last chunks are read; see `layer_gate.ranges_of`.
    """

    pace: Callable[..., RestorePace] = RestorePace
    ranges: Callable[[Costs, int, float], int] = ranges_of
