"""What one restore believes about its two sides, and what the main thread does about it.

What was learnt from earlier prompts is a start. What this restore sees corrects it: the chunks that the main thread computes
give one common factor on the believed time, the loads that arrive give another. So a machine that has become slower or faster
since then, or does so in the middle of a restore, is followed within a chunk. Pure arithmetic: no clock, no threads.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from cake_hf.arithmetic.costs import MAX_SECONDS, ComputeCost, Costs, LoadCost
from cake_hf.arithmetic.frontier import Judge

TRIAL_SHARE = 0.02
"""Of the time that restores take, what may be spent on trials of a side that is not used."""

BESIDE_LOADS = 0.2
"""What a second of computing takes from loads at most: where both want the same cores or the same memory, each has half."""


LATE = 8.0
"""A load that is late by x is expected to take that many times x more. Computing for nothing is cheap: the forward is left when
the load arrives."""

IN_PLACE = 2.0
"""Overtaking loads in place loses all that are under way: so it must be worth that many times what it costs."""

MARGIN = 2.0
"""Loads go into place where computing is not worth it, and would not be with loads that take so many times as long."""


class Pace(Judge):
    """The costs of one restore as they are now. Used under the frontier's lock, but for `saw_forward`: main thread only.

    Let f be the seconds of the chunk at the front, R those until all loads are there that are left, and h what of R is hidden
    behind what follows the loads (see `planner.hidden_by_layers`). The rule: compute the chunk if `f < R - h`. With true
    costs that is the best split; the proof is at `worth`.

    *Trials.* Where the rule says to wait, nothing would ever tell that computing has become cheaper. But a waiting main thread
    has nothing else to do, and a forward can be left after each layer. So it begins the chunk anyway, and after one layer it
    knows what a layer takes, and asks the rule again. That is a trial. If the belief was right, a trial costs a layer's time at
    most, t = f / layers: it takes at most half of that from the loads (`BESIDE_LOADS`), and all that lasts beyond them. A
    trial is made once that price is earned: as `TRIAL_SHARE` of the time of all restores since the last one. So, where the
    beliefs hold, all trials together cost at most 2 % of all restores. If computing is believed k times as dear as loading
    all (f = k * R), it is tried in one restore out of `k * BESIDE_LOADS / (TRIAL_SHARE * layers)`: in each one up to k = 1.28
    with 32 layers.

    Args:
        costs: as learnt.
        first: index on the absolute grid of the restore's chunk 0.
        chunks: of the restore.
        layers: of the model: a forward can be left after each.
        threads: that load.
        following_seconds: what comes after the loads, by itself.
        ranges: of layers, in which each of the last chunks is read; 1 hides nothing.
        credit: seconds of restores since the last trial.

    Attributes:
        steps: index on the absolute grid, and seconds, of the chunks that the main thread has measured.
        credit: as given, with this restore once it has ended.
        lateness: where no load has arrived, how many times as long as believed they took at least.
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

    # What happened.

    def loading(self, now: float) -> None:
        """A load was begun."""
        if not self._arrivals:
            self._arrivals.append(now)

    def loaded(self, now: float) -> None:
        """A load has arrived."""
        self._arrivals.append(now)

    def saw_forward(self, chunk: int, seconds: float, share: float = 1.0) -> None:
        """A chunk was computed, or that share of it."""
        if not (0 < share <= 1 and 0 <= seconds <= MAX_SECONDS):
            return
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
        """Whether to compute that chunk now, rather than to wait for the loads."""
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
        layer = self._seconds(chunk) / self._layers
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
