"""How restores share an engine's steps, and the path to the store, with other requests and with one another. Pure arithmetic.

An engine (continuous batching) runs one step after another. A restore's front takes steps of its own, one chunk each, while its
back is loaded beside all steps. The symbols are those of `planner`: f is the time to compute the chunk at the front, l the time
to load a chunk, R the time that the restore still takes at best (T*). Those of queueing theory are lambda, the requests that
come per second, and rho, the share of the engine's time that they take.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

LATE = 8.0
"""A load that is late by x is expected to take this many times x more, as in `pace`."""

AGEING = 0.05
"""A front that has waited for a step counts as shorter by this share of its wait, so that it is never left behind for ever."""


RECENT = 16
"""Arrivals that lambda and rho are measured over: enough to even out chance, few enough to notice a change soon."""


def remaining_seconds(compute: Sequence[float], loads: Sequence[float], load_seconds: float) -> float:
    """Returns R: the least time until all chunks are there, with the whole machine and the whole path for this restore.

    The formula of `planner.plan`: of m chunks computed from the front, `max(F(m), L(m)) + H(m)`, where H are the holes behind.

    Args:
        compute: f_i of the chunks that are not there, from the front.
        loads: as how many loads each of them counts, by its bytes; 0 if it cannot be loaded.
        load_seconds: l.
    """
    fronts = list(accumulate(compute, initial=0.0))
    best, left, holes = fronts[-1], 0.0, 0.0
    for m in reversed(range(len(compute))):
        if loads[m]:
            left += loads[m]
            best = min(best, max(fronts[m], left * load_seconds) + holes)
        else:
            holes += compute[m]
    return best


def loads_wait(left: float, load_seconds: float, idle: float, threads: int) -> float:
    """Returns the seconds until all remaining loads have arrived.

    Args:
        left: loads that have not arrived.
        load_seconds: l, between two arrivals.
        idle: seconds since the last arrival.
        threads: how many loads may arrive together.
    """
    late = idle - min(left, threads) * load_seconds
    return max(left * load_seconds - idle, LATE * late, 0.0)


def is_worth_computing(
    compute_seconds: float, left: float, load_seconds: float, idle: float, threads: int, delay: float
) -> bool:
    """Returns whether the chunk at the front is begun. The same question decides whether a load that is late is overtaken.

    The restore then has one load less to wait for. It is over sooner by that, but not before the chunk is computed. The sum of
    all waits is least if the others are delayed by at most as much.

    Args:
        compute_seconds: f.
        left, load_seconds, idle, threads: as for `loads_wait`.
        delay: of the other requests, in sum; see `Traffic.delay` and `StallBudget.delay`.
    """
    wait = loads_wait(left, load_seconds, idle, threads)
    saved = min(wait / max(left, 1.0), wait - compute_seconds)
    return saved > 0 and saved >= delay


def yields(
    compute_seconds: float,
    load_seconds: float | None,
    remaining: float,
    queued_seconds: float,
    queued_requests: int,
    waited: float,
) -> bool:
    """Returns whether a front leaves the next step to the requests that are queued.

    While they run for w seconds, the restore loads on: w/l chunks, which it need not compute. Of the wait it thus loses only
    `w * l / (f + l)`; if it goes first, each of the k others waits R longer. By Smith's rule the others go first while
    `w * l / (f + l) <= k * R`. A front that has waited long counts as shorter.

    Args:
        compute_seconds: f.
        load_seconds: l; None if nothing of the restore is loaded, so that it loses all of w.
        remaining: R.
        queued_seconds: w, prefill of the others that is waiting.
        queued_requests: k.
        waited: seconds since the front could have gone on.
    """
    if not queued_requests:
        return False
    share = 1.0
    if load_seconds is not None and compute_seconds + load_seconds > 0:
        share = load_seconds / (compute_seconds + load_seconds)
    return queued_seconds * share <= queued_requests * (remaining - AGEING * waited)


def holds_back(queued_seconds: float, queued_requests: int, delay: float, waited: float) -> bool:
    """Returns whether a prompt whose prefix is there waits before its last tokens join the steps of the others.

    With attention over a mask, each token of a step is compared with all KV of all its requests: a long prompt makes the steps
    of the others dear, while its own last tokens take next to nothing. If it joins, the k others wait longer by half of that
    delay on average; if it does not, it waits for their w seconds. It goes last while `w <= k * delay / 2`, until it has waited
    long.

    Args:
        queued_seconds: w, prefill of the others that is waiting.
        queued_requests: k.
        delay: seconds by which the others' prefill takes longer with the prompt in their steps.
        waited: seconds since its prefix was there.
    """
    return queued_requests > 0 and queued_seconds <= queued_requests * (delay / 2 - AGEING * waited)


def first_front(fronts: Sequence[tuple[float, float]]) -> int:
    """Returns which of several fronts gets the step: the one with the least R, less its age.

    Args:
        fronts: pairs (R, seconds waited), not empty.
    """
    return min(range(len(fronts)), key=lambda index: fronts[index][0] - AGEING * fronts[index][1])


def next_load(candidates: Sequence[tuple[float, int]]) -> int:
    """Returns for which of several restores the next chunk is loaded: where that saves the most computing.

    Args:
        candidates: pairs (f of the chunk that would be loaded, loads of that restore under way), not empty, oldest first.
    """
    return min(range(len(candidates)), key=lambda index: (-candidates[index][0], candidates[index][1], index))


class Traffic:
    """The requests that come to an engine: how many, and how much of its time they take."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, float]] = deque(maxlen=RECENT + 1)
        self._worked = 0.0

    def came(self, requests: int, now: float) -> None:
        """Counts requests that have come together."""
        self._arrivals.extend([(now, self._worked)] * requests)

    def worked(self, seconds: float) -> None:
        """Counts a step that was not one restore's alone."""
        self._worked += seconds

    def delay(self, seconds: float, now: float) -> float:
        """Returns by how long, in sum, requests that may come are delayed by a step of that length which does nothing for them.

        The step is a backlog of `seconds`, which the engine works off in 1 - rho of its time. Each request that comes until
        then waits for what is left of it: together `lambda * seconds^2 / (2 * (1 - rho))`. Requests that came together say
        nothing of lambda.
        """
        if not self._arrivals:
            return 0.0
        (begin, worked), (last, _) = self._arrivals[0], self._arrivals[-1]
        requests = sum(at > begin for at, _ in self._arrivals)
        if not requests:
            return 0.0
        interval = max((last - begin) / requests, now - last)
        idle = interval - (self._worked - worked) / requests
        return seconds * seconds / (2 * idle) if idle > 0 else math.inf


@dataclass
class StallBudget:
    """Keeps steps that only one restore gains from to a share of the steps in which requests are decoding.

    In any N steps in a row, at most `share * N + 1` are such steps.

    Attributes:
        share: between 0, exclusive, and 1.
    """

    share: float
    _credit: float = 1.0

    def delay(self, seconds: float) -> float:
        """Returns what one restore's step of that length costs those that decode: all but the share that they grant it."""
        return (1.0 - self.share) * seconds

    def allows(self) -> bool:
        """Returns whether the next step may be one restore's alone."""
        return self._credit >= 1.0 - 1e-9

    def spend(self) -> None:
        """Counts a step of one restore alone."""
        self._credit = min(1.0, self._credit - 1.0 + self.share)

    def earn(self) -> None:
        """Counts a step of the others."""
        self._credit = min(1.0, self._credit + self.share)
