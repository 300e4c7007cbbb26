"""Timings that can be trusted a little: medians over rounds in which the arms take turns.

A machine's speed drifts (other programs, heat), so two things are only comparable if they ran at about the same time. Each
round runs every arm once, and each round begins with another arm, so that none always profits from its place.

On a virtual machine a run may have got only a part of the processors. The system tells which runs those are, whatever their
results; such a run is repeated. If the machine was disturbed all the time, the results say so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.stolen import StolenTime

T = TypeVar("T")


QUARTILES_FROM = 8
"""With at least this many readings quartiles mean something; fewer are described by the least and the greatest."""

TOLERATED = 0.05
"""The share of the processors' time that may be stolen from a run (see `stolen`)."""
MOST_TRIES = 3
"""The most tries of one run. The one from which least was stolen counts."""


@dataclass(frozen=True)
class Sample:
    """Repeated readings of one quantity, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle reading: one slow round does not move it."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles, or, of few readings, the least and the greatest."""
        if len(self.values) < QUARTILES_FROM:
            return min(self.values), max(self.values)
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def interleave(
    arms: Mapping[str, Callable[[], T]], rounds: int, watch: Callable[[], StolenTime] = StolenTime
) -> dict[str, list[T]]:
    """Runs every arm once per round; round k begins with arm k (modulo their number).

    A run from which too much time was stolen is repeated, but not in the first round: what is new only then, such as a cache
    that knows nothing of the costs, cannot be had again.

    Args:
        arms: to run, by name.
        rounds: how many.
        watch: starts to watch the stolen time.

    Returns:
        For each arm its results, in the order of the rounds.
    """
    results: dict[str, list[T]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            results[name].append(_least_disturbed(arms[name], MOST_TRIES if number else 1, watch))
    return results


def _least_disturbed(arm: Callable[[], T], tries: int, watch: Callable[[], StolenTime]) -> T:
    found: list[tuple[float, T]] = []
    while len(found) < tries and all(share > TOLERATED for share, _ in found):
        watching = watch()
        result = arm()
        found.append((watching.share(), result))
    return min(found, key=lambda one: one[0])[1]


def ratio(above: Sample, below: Sample) -> tuple[float, float, float]:
    """Returns the median of the ratios of the single rounds, and their spread.

    This is not the ratio of the medians, which may come from rounds that ran at different times, on a machine of another
    speed.
    """
    by_round = Sample(tuple(a / b for a, b in zip(above.values, below.values, strict=True)))
    return by_round.median, *by_round.spread
