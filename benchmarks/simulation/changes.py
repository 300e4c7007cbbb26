"""`python -m benchmarks simulate --changes`: a machine that changes, and beliefs that are wrong, on a virtual clock.

In each of some dozens of settings, compute or bandwidth changes in the middle of a restore; comes in bursts, in noise,
drifts; was believed to be four times as dear or as cheap; is under a load for some prompts, and then not. Each is compared
with the best that was possible, and with the same rule with beliefs that a restore does not correct ("fixed").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import exp
from statistics import median
from typing import Any, Literal

from benchmarks.simulation.simulator import (
    Setting,
    best_after,
    best_seconds,
    learnt,
    simulate,
    simulate_prompts,
    steps,
)
from benchmarks.simulation.speeds import Speed, bursts, drift, noise, step
from cake_hf.cli.sheets import Sheet

Policy = Literal["both", "fixed"]
POLICIES: tuple[Policy, ...] = ("both", "fixed")

STEP, MEGABYTE = 0.05, 1e6
"""Seconds to compute a first chunk, and bytes of any chunk: only their ratios matter."""

MOMENTS = (0.05, 0.3, 0.5, 0.7, 0.9)
"""The parts of the undisturbed restore at which something changes."""

SLOWER = 0.15
"""The share of the device that a passing load leaves."""

TITLE = "A machine that changes, and beliefs that are wrong"

LEGEND = (
    "In the middle: seconds from the change on, less one chunk, over the least that were possible then. In noise, bursts and "
    "drift, and with wrong beliefs: seconds over the least possible. Between prompts: over a cache that never saw another "
    "speed. Median\\90th percentile\\greatest over all settings; fixed: the same rule without correcting and trying; "
    "! misses the goal."
)


@dataclass(frozen=True)
class Row:
    """One kind of change over all settings.

    Attributes:
        name: of it.
        both, fixed: one ratio per setting.
        goal: of the greatest ratio; None for none.
    """

    name: str
    both: tuple[float, ...]
    fixed: tuple[float, ...]
    goal: float | None

    def cells(self) -> list[str]:
        """Returns the row's cells in a table."""
        missed = "!" if self.goal is not None and max(self.both) > self.goal else ""
        goal = "-" if self.goal is None else f"{self.goal:g}"
        return [self.name, str(len(self.both)), _three(self.both) + missed, _three(self.fixed), goal]

    def plain(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {"change": self.name, "both": list(self.both), "fixed": list(self.fixed), "goal": self.goal}


def settings() -> Iterator[Setting]:
    """Returns prompts of 8 and 32 chunks; loading takes from 0.3 to 2 times as long as computing."""
    for chunks, ratio, threads, layers in product((8, 32), (0.3, 0.7, 1.0, 2.0), (1, 2), (8, 32)):
        costs = steps(chunks, STEP, 0.02 * STEP)
        bandwidth = MEGABYTE * chunks / (ratio * sum(costs))
        yield Setting(costs, MEGABYTE, bandwidth, threads=threads, layers=layers, suffix=STEP / 5)


def table(where: Sequence[Setting], tick: Callable[[], None] = lambda: None) -> list[Row]:
    """Simulates every kind of change in each of the settings.

    Args:
        where: the settings.
        tick: called after each row.
    """
    rows = []
    for name, (goal, measure) in CHANGES.items():
        found = {policy: tuple(value for one in where for value in measure(one, policy)) for policy in POLICIES}
        rows.append(Row(name, found["both"], found["fixed"], goal))
        tick()
    return rows


def sheet(rows: Sequence[Row]) -> Sheet:
    """Returns the table for people."""
    return Sheet(TITLE, ("<change", "n", "ours", "fixed", "goal"), [row.cells() for row in rows])


Measure = Callable[[Setting, Policy], list[float]]


def _in_the_middle(compute: float, line: float) -> Measure:
    def measure(setting: Setting, policy: Policy) -> list[float]:
        ratios, whole = [], simulate(setting, "both").seconds
        for moment in MOMENTS:
            when = moment * whole
            changed = replace(setting, compute_speed=step(when, compute), line_speed=step(when, line))
            outcome = simulate(changed, policy)
            chunk = max(setting.step_seconds) * max(1.0, 1 / compute)
            possible = best_after(changed, outcome, when) - when
            ratios.append(max(0.0, outcome.seconds - when - chunk) / possible)
        return ratios

    return measure


def _throughout(speeds: Callable[[float], tuple[Speed, Speed]]) -> Measure:
    def measure(setting: Setting, policy: Policy) -> list[float]:
        compute, line = speeds(best_seconds(setting))
        changed = replace(setting, compute_speed=compute, line_speed=line)
        outcome = simulate(changed, policy)
        return [outcome.seconds / best_after(changed, replace(outcome, spans=(), reads=()), 0.0)]

    return measure


def _noise(seconds: float) -> tuple[Speed, Speed]:
    numbers = random.Random(7)
    compute, line = ([exp(numbers.gauss(0, 0.3)) for _ in range(400)] for _ in range(2))
    return noise(compute, STEP), noise(line, 0.6 * STEP)


def _bursts(seconds: float) -> tuple[Speed, Speed]:
    return bursts(8 * STEP, 3 * STEP, 0.25, 10 * seconds), bursts(6 * STEP, 2 * STEP, 0.25, 10 * seconds)


def _drift(seconds: float) -> tuple[Speed, Speed]:
    return drift(0, seconds, 0.3), drift(0, seconds, 3.0)


def _believing(prompt: int, compute: float = 1.0, load: float = 1.0) -> Measure:
    """Simulates a restore that at first believes one side to take that many times its real time."""

    def measure(setting: Setting, policy: Policy) -> list[float]:
        dear = tuple(seconds * compute for seconds in setting.compute)
        believed = learnt(replace(setting, compute=dear, bandwidth=setting.bandwidth / load))
        outcomes = simulate_prompts([setting] * prompt, believed, policy)
        return [outcomes[-1].seconds / best_seconds(setting)]

    return measure


def _after_a_load(setting: Setting, policy: Policy) -> list[float]:
    """Simulates a cache that learned everything under a load; over a cache that learned on the quiet machine."""
    busy = replace(setting, compute_speed=step(0.0, SLOWER))
    taught = learnt(replace(setting, compute=tuple(seconds / SLOWER for seconds in setting.compute)))
    outcomes = simulate_prompts([busy] * 3 + [setting] * 10, taught, policy)[5:]
    fresh = simulate_prompts([setting] * 3, learnt(setting), policy)[-1].seconds
    return [sum(outcome.seconds for outcome in outcomes) / len(outcomes) / fresh]


def _after_a_fall(setting: Setting, policy: Policy) -> list[float]:
    slow = replace(setting, line_speed=step(0.0, 0.1))
    fallen = simulate_prompts([setting] * 3 + [slow] * 2, learnt(setting), policy)[-1].seconds
    knowing = learnt(replace(setting, bandwidth=setting.bandwidth / 10))
    return [fallen / simulate_prompts([slow] * 3, knowing, policy)[-1].seconds]


def _quiet(setting: Setting, policy: Policy) -> list[float]:
    outcomes = simulate_prompts([setting] * 6, learnt(setting), policy)
    return [max(outcome.seconds for outcome in outcomes) / best_seconds(setting)]


CHANGES: dict[str, tuple[float | None, Measure]] = {
    "computing 4x slower, in the middle": (1.25, _in_the_middle(0.25, 1.0)),
    "computing 4x faster, in the middle": (1.25, _in_the_middle(4.0, 1.0)),
    "bandwidth a tenth, in the middle": (1.25, _in_the_middle(1.0, 0.1)),
    "bandwidth 10x, in the middle": (1.25, _in_the_middle(1.0, 10.0)),
    "noise of 30 % on both": (None, _throughout(_noise)),
    "bursts of a quarter on both": (None, _throughout(_bursts)),
    "drift: computing to 0.3x, line to 3x": (None, _throughout(_drift)),
    "computing believed 4x, first prompt": (1.5, _believing(1, compute=4.0)),
    "computing believed 4x, third prompt": (1.05, _believing(3, compute=4.0)),
    "computing believed 1/4, first prompt": (1.5, _believing(1, compute=0.25)),
    "computing believed 1/4, third prompt": (1.05, _believing(3, compute=0.25)),
    "loading believed 4x, first prompt": (1.5, _believing(1, load=4.0)),
    "loading believed 4x, third prompt": (1.05, _believing(3, load=4.0)),
    "loading believed 1/4, first prompt": (1.5, _believing(1, load=0.25)),
    "loading believed 1/4, third prompt": (1.05, _believing(3, load=0.25)),
    "after a passing load, prompts 3-10": (1.05, _after_a_load),
    "bandwidth fell to a tenth, 2nd prompt": (1.05, _after_a_fall),
    "nothing changes, worst of six prompts": (1.02, _quiet),
}
"""Each kind of change, with the goal of its greatest ratio."""


def _three(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"{median(ordered):.2f}\\{ordered[int(0.9 * (len(ordered) - 1))]:.2f}\\{ordered[-1]:.2f}"
