"""Speeds that change at given moments: the behaviour of a simulated machine while a restore runs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LEAST, MOST = 1e-6, 1e6


@dataclass(frozen=True)
class Speed:
    """A speed over time, in steps. Work is counted in seconds at speed 1.

    Attributes:
        changes: (when, speed from then on), by time. Before the first one the speed is 1.

    Raises:
        ValueError: the times do not grow from 0 on, or a speed is out of range.
    """

    changes: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        times = [when for when, _ in self.changes]
        if not all(0 <= one < other for one, other in pairwise([*times, math.inf])):
            raise ValueError(f"The moments at which a speed changes must grow, from 0 on, got {times}.")
        if bad := [speed for _, speed in self.changes if not LEAST <= speed <= MOST]:
            raise ValueError(f"A speed must be between {LEAST:g} and {MOST:g}, got {bad[0]:g}.")

    def at(self, when: float) -> float:
        """Returns the speed at that moment."""
        place = bisect_right([change for change, _ in self.changes], when)
        return self.changes[place - 1][1] if place else 1.0

    def end(self, start: float, work: float) -> float:
        """Returns when work is done that starts at `start` and is not interrupted."""
        now = start
        for when, _ in self.changes:
            if when <= now:
                continue
            done = (when - now) * self.at(now)
            if done >= work:
                break
            now, work = when, work - done
        return now + work / self.at(now)

    def work(self, start: float, end: float) -> float:
        """Returns how much work is done between two moments."""
        borders = [start, *(when for when, _ in self.changes if start < when < end), end]
        return sum((b - a) * self.at(a) for a, b in pairwise(borders))


def step(when: float, speed: float) -> Speed:
    """Returns another speed from one moment on."""
    return Speed(((when, speed),))


def bursts(period: float, busy: float, speed: float, until: float) -> Speed:
    """Returns that speed for the first `busy` seconds of each `period`, and 1 otherwise."""
    changes: list[tuple[float, float]] = []
    start = 0.0
    while start < until:
        changes += [(start, speed), (start + busy, 1.0)]
        start += period
    return Speed(tuple(changes))


def drift(start: float, end: float, speed: float, steps: int = 16) -> Speed:
    """Returns a speed that goes from 1 at `start` to another one at `end`, by equal factors."""
    return Speed(
        tuple((start + (end - start) * number / steps, speed ** (number / steps)) for number in range(1, steps + 1))
    )


def noise(factors: Sequence[float], every: float) -> Speed:
    """Returns another speed in each interval."""
    return Speed(tuple((number * every, factor) for number, factor in enumerate(factors)))


CONSTANT = Speed()
