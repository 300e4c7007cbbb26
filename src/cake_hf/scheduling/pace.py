"""What one restore believes about its two sides, and what the main thread does about it.

What was learnt from earlier prompts is a start. What this restore sees corrects it: the chunks that the main thread computes
give one common factor on the believed time, the loads that arrive give another. So a machine that has become slower or faster
since then, or does so in the middle of a restore, is followed within a chunk. Pure arithmetic: no clock, no threads.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from cake_hf.scheduling.costs import MAX_SECONDS, ComputeCost, Costs, LoadCost
from cake_hf.scheduling.frontier import Judge

TRIAL_SHARE = 0.02
"""Of the time that restores take, what may be spent on trials of a side that is not used."""

BESIDE_LOADS = 0.2
"""What a second of computing is reckoned to take from loads. From those of a network or a disk it takes next to nothing; where
both want the same cores or memory it may be half: then trials cost up to 5 % instead of 2."""

LATE = 8.0
"""A load that is late by x is expected to take that many times x more. Computing for nothing is cheap: the forward is left when
the load arrives."""

IN_PLACE = 2.0
"""Overtaking loads in place loses all that are under way: so it must be worth that many times what it costs."""

MARGIN = 2.0
"""Loads go into place where computing is not worth it, and would not be with loads that take so many times as long."""


class Pace(Judge):
    """The costs of one restore as they are now. Used under the frontier's lock, but for `saw_forward`: main thread only.

    The rule: compute the chunk at the front if that is done before all loads are there that are left. With true costs that is
    the best split; the proof is at `worth`.

    *Trials.* Where the rule says to wait, nothing would ever tell that computing has become cheaper. But a waiting main thread
    has nothing else to do, and a forward can be left after each layer. So it begins the chunk anyway, and after one layer it
    knows what a layer takes, and asks the rule again. That is a trial. If the belief was right, it costs what of that layer is
    taken from the loads (`BESIDE_LOADS`), and all that lasts beyond them. A trial is made once that price is earned: as
    `TRIAL_SHARE` of the time of all restores since the last one. So, where the beliefs hold, all trials together cost at most
    2 % of all restores. If computing a chunk is believed k times as dear as loading all, it is tried in one restore out of
    `k * BESIDE_LOADS / (TRIAL_SHARE * layers)`: in each one up to k = 3.2 with 32 layers.

    Args:
        costs: as learnt.
        first: index on the absolute grid of the restore's chunk 0.
        chunks: of the restore.
        layers: of the model: a forward can be left after each.
        threads: that load.
        following_seconds: what comes after the loads, by itself.
        ranges: of layers, in which each of the last chunks is read; 1 hides nothing.
        credit: seconds of restores since the last trial.
        quiet: of the time that chunks took which the costs were learnt from, the part that others on the machine left to them.
            A trial is to find out whether these are gone: so its price is reckoned without them.

    Attributes:
        steps: index on the absolute grid, and seconds, of the chunks that the main thread has measured.
        credit: as given, with this restore once it has ended.
        lateness: where no load has arrived, how many times as long as believed they took at least.
        shares: of the time of each step, what others on the machine left to it.
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
        self._factor = 1.0  # of the believed compute time
        self._arrivals: list[float] = []  # when loading began, and when each load ended
        self.steps: list[tuple[int, float]] = []
        self.lateness = 1.0
        self.shares: list[float] = []
        self._quiet = quiet

    # What happened.

    def loading(self, now: float) -> None:
        """A load was begun."""
        if not self._arrivals:
            self._arrivals.append(now)

    def loaded(self, now: float) -> None:
        """A load has arrived."""
        self._arrivals.append(now)

    def saw_forward(self, chunk: int, seconds: float, share: float = 1.0, *, worked: float | None = None) -> None:
        """A chunk was computed, or that share of it.

        Args:
            chunk: of the restore.
            seconds: that it took.
            share: of the chunk's layers.
            worked: seconds of these in which the thread had a processor; None where that is not known.
        """
        if not (0 < share <= 1 and 0 <= seconds <= MAX_SECONDS):
            return
        if worked is not None and 0 < worked <= seconds:
            self.shares.append(worked / seconds)
        index, whole = self._first + chunk, min(seconds / share, MAX_SECONDS)
        if self.steps and self.steps[-1][0] == index:
            self.steps.pop()  # it was the first layers' time
        self.steps.append((index, whole))
        if self._compute is None:
            self._compute = ComputeCost(whole)
        believed = self._compute.seconds(index)
        self._factor = whole / believed if believed > 0 else 1.0

    # What to do.

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        """Whether to compute that chunk now, rather than to wait for the loads. True where a cost is not known.

        False when all loads that are left would be there no later than the compute step ends; and when the sides would meet no
        sooner than the loads are there, less what of them is hidden.

        Proof that the first is optimal when the costs hold. Let chunk i be stored, F(i) the time to compute all chunks before
        it, L(i) the time at which all loads of chunks i.. would be there, H(i) the time of the holes in i.., and
        `T(m) = max(F(m), L(m)) + H(m)` as in `planner.plan`. The rule goes on while `F(i + 1) < L(i)` and stops at the first
        stored i with `F(i + 1) >= L(i)`: it takes T(i). (1) m > i: all of F(i + 1) and the holes are computed, so
        `T(m) >= F(m) + H(m) >= F(i + 1) + H(i + 1) >= T(i)`. (2) m < i: `T(m) >= L(m) + H(m) >= L(i) + H(i)`; and with j the
        last stored chunk before i, whose step was begun, `F(i) + H(i) = F(j + 1) + H(j) < L(j) + H(j) <= T(m)`. Hence
        `T(i) = min T`: as fast as the best split, and never slower than computing all, T(n), or loading all, T(0).

        That holds where a chunk may be computed although a loader holds it. Where such a chunk has to be waited for instead,
        at most one interval is lost: its load was under way, so `L(i) <= F(i) + interval`, while every split takes at least
        F(i) + H(i), see (1) and (2).

        If the compute costs g that the rule believes in are not the true f, it still stays within one step of the optimum
        (true loads, no holes): `T <= T* + max(f_0.., g_0..)`. Let it stop at i, so `T = max(F(i), L(i))`. It waits only if
        `L(i) <= F(i) + g_i`, and it began the step before at `F(i - 1) < L(i - 1)`, so `F(i) < L(i - 1) + f_(i-1)`; while
        every split takes at least `min(F(i), L(i - 1))`. In the same way it is at most one true step slower than loading all.

        If loads stop arriving, it waits at most `g_i / LATE` longer than the next ones should have taken, provided that it is
        asked again meanwhile.
        """
        wait = self._wait(loads_left, now)
        if wait is None or self._compute is None:
            return True
        if not self._seconds(chunk) < wait:
            return False
        hidden = 0.0 if whole else self._hidden()
        return hidden == 0 or self._meeting(chunk, loads_left, now) < wait - hidden

    def may_be_worth(self, chunk: int, loads_left: int, now: float) -> bool:
        """Whether it would be, were the loads somewhat slower than is believed."""
        wait = self._wait(loads_left, now)
        return wait is None or self._compute is None or self._seconds(chunk) < MARGIN * wait

    def overdue(self, chunk: int, loads_left: int, now: float) -> bool:
        """Whether loads in place are so late that they had better all be computed. All under way are lost then."""
        wait = self._wait(loads_left, now)
        return wait is not None and self._compute is not None and IN_PLACE * loads_left * self._seconds(chunk) < wait

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        """Whether to begin a chunk that is not worth computing, to find out whether that is true."""
        wait = self._wait(loads_left, now)
        # The last loads of all may come layer by layer, which a trial beside them would prevent.
        if wait is None or self._compute is None or self._layers < 2 or loads_left <= self._threads:
            return False
        layer = self._quiet * self._seconds(chunk) / self._layers
        price = BESIDE_LOADS * min(layer, wait) + max(0.0, layer - wait)
        restore = now - self._arrivals[0] + wait
        if price > TRIAL_SHARE * (self.credit + restore):
            return False
        self.credit = -restore
        return True

    def near(self, now: float) -> int:
        """How many chunks beyond the front should be loaded aside, so that the main thread need not wait for their loads.

        While `threads` loads are under way, which takes `threads * interval` seconds, the main thread computes
        `threads * interval / f` chunks; so many chunks nearer to the front may be reached before their load has ended. Twice
        that is taken, and one chunk per thread at least. All chunks where a cost is not known.
        """
        if self._compute is None or self._load is None:
            return self._chunks
        reach = 2 * self._threads * self._load.interval * self._lateness(now)
        step = self._seconds(0)
        return (
            self._chunks if reach >= step * self._chunks else min(self._chunks, self._threads + math.ceil(reach / step))
        )

    def end(self, now: float) -> None:
        """The restore is over."""
        if not self._arrivals:
            return
        self.credit += now - self._arrivals[0]
        if len(self._arrivals) == 1:
            self.lateness = max(1.0, self._lateness(now))

    # What is believed.

    def _seconds(self, chunk: int) -> float:
        assert self._compute is not None
        return self._factor * self._compute.seconds(self._first + chunk)

    def _hidden(self) -> float:
        """Seconds of the loads' time that are hidden where the last chunks come in ranges of layers.

        What follows (computing the prompt's last piece, or the hole behind the loads) begins when each thread is at its last
        chunk, and runs through a layer as soon as that layer of them is there. So it is done when both it and the loads are,
        but for the last range: of the shorter of the two, all but `1 / ranges` is hidden.
        """
        if self._load is None:
            return 0.0
        return min(self._following, self._threads * self._load.interval) * (1 - 1 / self._ranges)

    def _meeting(self, chunk: int, left: int, now: float) -> float:
        """Seconds until the two sides meet: `min over m of max(f_0 + ... + f_(m-1), L(left - m))`, found by bisection."""

        def ends(computed: int) -> tuple[float, float]:
            assert self._compute is not None
            first = self._first + chunk
            middle = self._compute.base + self._compute.slope * (first + (computed - 1) / 2)
            return self._factor * computed * middle, self._wait(left - computed, now) or 0.0

        def have_met(computed: int) -> bool:
            front, back = ends(computed)
            return front >= back

        at = bisect_left(range(left), True, key=have_met)
        return min(max(ends(at)), max(ends(max(0, at - 1))))

    def _wait(self, left: int, now: float) -> float | None:
        """Seconds until all loads that are left are there; None where nothing is known about that.

        By the loads' model they take `finish(done + left) - finish(done)` from the last arrival on. That times their lateness.
        A load that is late is expected to be late by `LATE` times as much.
        """
        load, done = self._load, len(self._arrivals) - 1
        if load is None or left < 1 or done < 0:
            return None
        idle = now - self._arrivals[-1]
        late = idle - self._past(load) * (load.finish(done + min(left, self._threads)) - load.finish(done))
        return max(self._lateness(now) * (load.finish(done + left) - load.finish(done)) - idle, LATE * late, 0.0)

    def _lateness(self, now: float) -> float:
        """How many times as long as believed loads take at present. Those that are awaited count as soon as they are late."""
        load, done = self._load, len(self._arrivals) - 1
        if load is None or done < 0:
            return 1.0
        start = max(0, done - self._threads)
        due = load.finish(done + self._threads) - load.finish(start)
        return max(self._past(load), (now - self._arrivals[start]) / due if due > 0 else 0.0)

    def _past(self, load: LoadCost) -> float:
        """As `_lateness`, by the last arrivals only: one of each thread, as these may come together or one after the other."""
        done = len(self._arrivals) - 1
        start = max(0, done - self._threads)
        took = self._arrivals[done] - self._arrivals[start]
        if done == 0 or load.finish(done) <= load.finish(start):
            return 1.0
        at_most = took / (load.finish(done) - load.finish(start))
        at_least = took / (load.finish(max(done, self._threads)) - load.finish(start))
        return min(max(1.0, at_least), at_most) if done < self._threads else at_most
