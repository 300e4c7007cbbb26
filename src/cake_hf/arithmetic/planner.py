"""Where the two ends should meet, what that will take, and whether one more compute step is worth it.

The formulas are those of Cake (Jin et al., "Compute Or Load KV Cache? Why Not Both?", ICML 2025, arXiv 2410.03065); what is
ours is how holes count, and the rule that a step is not begun if the loads will be there first. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from cake_hf.arithmetic.costs import MAX_INDEX, MAX_SECONDS, Costs, LoadCost

Decision = Literal["compute", "load", "both"]

MAX_RANGES = 16
"""Finer steps would hide next to nothing more, and each costs a read."""

FEW_CHUNKS = 32
"""See `overtakes_in_place`."""

RANGES_COST = 0.05
"""Of a chunk's time, what may be spent on reading it in ranges; it is spent on the last few chunks only."""


@dataclass(frozen=True)
class Plan:
    """How a prefix is best restored.

    Attributes:
        decision: "compute" (nothing is loaded), "load" (all that is stored is) or "both". Where a cost is not known it is
            "both" as soon as anything is stored: meeting in the middle needs no costs.
        split: m, the first m chunks are computed, from the others what is stored is loaded; None where a cost is not known.
        predicted_seconds: to the first token with that split; None where a cost is not known.
        curve: predicted seconds for each split 0..n; empty where a cost is not known.
    """

    decision: Decision
    split: int | None = None
    predicted_seconds: float | None = None
    curve: tuple[float, ...] = ()

    @property
    def gain(self) -> float | None:
        """How many times faster than the better of the two methods alone; at least 1."""
        if not self.curve or self.predicted_seconds is None:
            return None
        better = min(self.curve[0], self.curve[-1])
        return better / self.predicted_seconds if self.predicted_seconds else 1.0


def plan(costs: Costs, stored: Sequence[bool], first: int = 0, suffix_seconds: float = 0.0) -> Plan:
    """The split with the least predicted time to first token. O(n).

    With all n chunks stored, a split m takes `max(f_0 + ... + f_(m-1), L(n - m)) + S` seconds (Cake's formula), where f_i is
    the time to compute chunk i, L(k) that to load k chunks (`k * l` with one thread), S the suffix.

    Holes, chunks that are not stored, are computed whatever the split. Computing one needs all chunks before it, and loads
    arrive back to front; so a hole behind a loaded chunk waits for the last load. If chunk m is stored,
    `T(m) = max(F(m), L(stored chunks in m..n-1)) + H(m) + S`, with F(m) the time to compute chunks 0..m-1 and H(m) that of the
    holes in m..n-1. If chunk m is a hole, computing just goes on: `T(m) = T(m + 1)`. And `T(n) = F(n) + S`.

    Both single methods are on that curve, as T(0) and T(n); so the prediction is never worse than the better of them.

    Args:
        costs: of this machine, model and store.
        stored: for each chunk, whether the store has it.
        first: index on the absolute grid of the first chunk (those before it are in the cache already).
        suffix_seconds: S, seconds to run the prompt's last piece once its prefix is there.

    Raises:
        ValueError: `first` or `suffix_seconds` is negative, not a number or absurdly large.
    """
    if not (0 <= first <= MAX_INDEX and 0 <= suffix_seconds <= MAX_SECONDS):
        raise ValueError(
            f"The first chunk ({first}) and the suffix's seconds ({suffix_seconds}) must not be negative or absurd."
        )
    if costs.compute is None or (costs.load is None and any(stored)):
        return Plan("both" if any(stored) else "compute")
    compute = [costs.compute.seconds(first + i) for i in range(len(stored))]
    curve = _curve(compute, costs.load.finish if costs.load else lambda count: 0.0, stored, suffix_seconds)
    predicted = min(curve)
    split = curve.index(predicted)
    return Plan(_decision(stored, split), split, predicted, tuple(curve))


def optimum(compute_seconds: Sequence[float], load_seconds: float, suffix_seconds: float = 0.0) -> float:
    """T*: the least time to first token when chunks are computed from the front and loaded from the back at once.

    With the first m of n chunks computed and the others loaded, both sides are done after
    `max(f_0 + ... + f_(m-1), (n - m) * l)` seconds; the best m is the limit of any token-wise split (Jin et al., ICML 2025).
    The suffix comes after it.

    Args:
        compute_seconds: f_i, seconds to compute chunk i.
        load_seconds: l, seconds to load any one chunk (bytes over bandwidth).
        suffix_seconds: S, seconds to run the prompt's last piece once its prefix is there.
    """
    all_stored = [True] * len(compute_seconds)
    return min(_curve(compute_seconds, lambda count: count * load_seconds, all_stored, suffix_seconds))


def worth_starting(costs: Costs, index: int, loads_left: int, idle_seconds: float, *, loads_done: int = 0) -> bool:
    """Whether to compute chunk `index` now, rather than to wait for the loads.

    False when all loads that are left would be there no later than the compute step ends. From the last arrival on they are
    expected to take `finish(done + left) - finish(done)` (see `LoadCost`); of that, `idle_seconds` have gone by. If they are
    overdue they are expected to be late by twice that, so that a store that got stuck is not waited for. True where a cost is
    not known.

    Proof that this rule is optimal when the costs hold. Let chunk i be stored, F(i) the time to compute all chunks before it,
    L(i) the time at which all loads of chunks i.. would be there, H(i) the time of the holes in i.., and
    `T(m) = max(F(m), L(m)) + H(m)` as in `plan`. The rule goes on while `F(i + 1) < L(i)` and stops at the first stored i with
    `F(i + 1) >= L(i)`: it takes T(i). (1) m > i: all of F(i + 1) and the holes are computed, so
    `T(m) >= F(m) + H(m) >= F(i + 1) + H(i + 1) >= T(i)`. (2) m < i: `T(m) >= L(m) + H(m) >= L(i) + H(i)`; and with j the last
    stored chunk before i, whose step was begun, `F(i) + H(i) = F(j + 1) + H(j) < L(j) + H(j) <= T(m)`. Hence `T(i) = min T`:
    as fast as the best split, and never slower than computing all, T(n), or loading all, T(0).

    That holds where a chunk may be computed although a loader holds it. Where such a chunk has to be waited for instead, at
    most one interval is lost: its load was under way, so `L(i) <= F(i) + interval`, while every split takes at least
    F(i) + H(i), see (1) and (2).

    If the compute costs g that the rule believes in are not the true f, it still stays within one step of the optimum (true
    loads, no holes): `T <= T* + max(f_0.., g_0..)`. Let it stop at i, so `T = max(F(i), L(i))`. It waits only if
    `L(i) <= F(i) + g_i`, and it began the step before at `F(i - 1) < L(i - 1)`, so `F(i) < L(i - 1) + f_(i-1)`; while every
    split takes at least `min(F(i), L(i - 1))`. In the same way it is at most one true step slower than loading all.

    If loads stop arriving, it waits at most `2 * g_i` before it computes, provided that it is asked again meanwhile; for loads
    in place as long as was expected and what they cost (see `Rule.overdue`), or, if these cannot be overtaken, until their
    deadline.

    Args:
        costs: as believed.
        index: of the chunk on the absolute grid.
        loads_left: chunks that are not there yet and would be loaded, `index` among them and loaded last.
        idle_seconds: since a load last arrived, or since loading began.
        loads_done: loads that have ended.
    """
    if costs.compute is None or costs.load is None or loads_left < 1:
        return True
    return abs(_expected(costs.load, loads_left, loads_done, idle_seconds)) > costs.compute.seconds(index)


def overdue(costs: Costs, index: int, loads_left: int, loads_done: int, idle_seconds: float) -> bool:
    """Whether the loads that are left are late by more than it takes to compute chunk `index`.

    The arguments are those of `worth_starting`. True where a cost is not known.
    """
    if costs.compute is None or costs.load is None or loads_left < 1:
        return True
    return -_expected(costs.load, loads_left, loads_done, idle_seconds) > costs.compute.seconds(index)


@dataclass(frozen=True)
class Rule:
    """When the main thread of one restore goes on computing.

    Attributes:
        costs: as believed.
        first: index on the absolute grid of the restore's chunk 0.
        loads_only: nothing is to be computed that can be loaded, unless the loads are late.
    """

    costs: Costs
    first: int = 0
    loads_only: bool = False

    @classmethod
    def choose(cls, costs: Costs, stored: Sequence[bool], first: int, *, following_seconds: float, ranges: int) -> Rule:
        """The better of meeting in the middle (`worth_starting`) and of loading all, where that hides part of the loads' time.

        Args:
            costs: as believed.
            stored: for each chunk, whether the store has it.
            first: index on the absolute grid of the first chunk.
            following_seconds, ranges: see `hidden_by_layers`.
        """
        curve = plan(costs, stored, first).curve
        hidden = hidden_by_layers(costs, following_seconds, ranges)
        return cls(costs, first, loads_only=bool(curve) and hidden > 0 and curve[0] - hidden <= min(curve))

    def worth(self, chunk: int, loads_left: int, loads_done: int, idle_seconds: float) -> bool:
        """Whether to begin computing that chunk now, as `Frontier` asks it."""
        index = self.first + chunk
        if self.loads_only:
            return overdue(self.costs, index, loads_left, loads_done, idle_seconds)
        return worth_starting(self.costs, index, loads_left, idle_seconds, loads_done=loads_done)

    def overdue(self, chunk: int, loads_left: int, loads_done: int, idle_seconds: float) -> bool:
        """Whether to overtake loads in place now, as `Frontier` asks it; without a cost nothing says that they are late.

        All that are under way are lost then. So they must be late by more than it takes to compute all of them.
        """
        if self.costs.compute is None or self.costs.load is None:
            return False
        price = loads_left * self.costs.compute.seconds(self.first + chunk)
        return -_expected(self.costs.load, loads_left, loads_done, idle_seconds) > price


def hidden_by_layers(costs: Costs, following_seconds: float, ranges: int) -> float:
    """Seconds of the loads' time that are hidden where the last chunks come in ranges of layers.

    What follows (computing the prompt's last piece, or the hole behind the loads) begins when each thread is at its last chunk,
    and runs through a layer as soon as that layer of them is there. So it is done when both it and the loads are, but for
    the last range: of the shorter of the two, all but `1 / ranges` is hidden.

    Args:
        costs: as believed; 0 where loading is not known.
        following_seconds: what comes after the loads, by itself.
        ranges: in which each of the last chunks is read; 1 hides nothing.
    """
    if costs.load is None:
        return 0.0
    return min(following_seconds, costs.load.threads * costs.load.interval) * (1 - 1 / ranges)


def ranges_of(costs: Costs, layers: int, range_seconds: float) -> int:
    """In how many ranges of layers a chunk is best read whose layers are waited for; 1 where a cost is not known.

    As many as there are layers, as long as a chunk's ranges together cost at most RANGES_COST of its time on the path more than
    the chunk in one.

    Args:
        costs: as believed.
        layers: of a chunk.
        range_seconds: what reading a range costs beyond its share of the chunk.
    """
    if costs.load is None or not range_seconds < costs.load.interval:
        return 1
    affordable = RANGES_COST * costs.load.interval / range_seconds if range_seconds > 0 else layers
    return max(1, int(min(layers, MAX_RANGES, affordable)))


def overtakes_in_place(chunks: int) -> bool:
    """Whether loads of a prompt in host memory that are waited for go into place, to be overtaken there if they are late.

    In a longer one, the few chunks that are copied once more for having gone aside are next to nothing; and its KV, which would
    be in memory twice from the overtaking to the end of the late loads, is much.

    Args:
        chunks: in memory with that prompt.
    """
    return chunks <= FEW_CHUNKS


def nearness(costs: Costs, first: int, chunks: int, threads: int) -> int:
    """How many chunks beyond the front should be loaded aside, so that the main thread need not wait for their loads.

    While `threads` loads are under way, which takes `threads * interval` seconds, the main thread computes
    `threads * interval / f` chunks; so many chunks nearer to the front may be reached before their load has ended. Twice
    that is taken, for what is not as learnt, and one chunk per thread at least. All chunks where a cost is not known.

    Args:
        costs: as believed.
        first: index on the absolute grid of the first chunk, the cheapest to compute.
        chunks: of the prompt.
        threads: that load.
    """
    if costs.compute is None or costs.load is None:
        return chunks
    reach = 2 * threads * costs.load.interval
    step = costs.compute.seconds(first)
    return chunks if reach >= step * chunks else min(chunks, threads + math.ceil(reach / step))


def _expected(load: LoadCost, left: int, done: int, idle_seconds: float) -> float:
    """Seconds until all loads that are left are there; negative if they are late."""
    return load.finish(done + left) - load.finish(done) - idle_seconds


def _curve(
    compute: Sequence[float], finish: Callable[[int], float], stored: Sequence[bool], suffix: float
) -> list[float]:
    """T(m) for each split m in 0..n; see `plan`."""
    fronts = list(accumulate(compute, initial=0.0))
    curve = [fronts[-1] + suffix]
    loads, holes = 0, 0.0
    for m in reversed(range(len(compute))):
        if stored[m]:
            loads += 1
            curve.append(max(fronts[m], finish(loads)) + holes + suffix)
        else:
            holes += compute[m]
            curve.append(curve[-1])
    return curve[::-1]


def _decision(stored: Sequence[bool], split: int) -> Decision:
    if not any(stored[split:]):
        return "compute"
    return "both" if any(stored[:split]) else "load"
