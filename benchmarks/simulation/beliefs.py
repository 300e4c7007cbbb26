"""`python -m benchmarks simulate --beliefs`: what it costs to believe in wrong costs, over a grid of settings.

Each of 168 settings is restored once per belief. The time is set beside the better of computing all and loading all, and beside
the best split. Run this before and after a change to a rule of the contest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

from benchmarks.simulation.simulator import Setting, best_seconds, learnt, simulate, simulate_prompts, steps
from cake_hf.cli.sheets import Sheet
from cake_hf.scheduling.learning import CostLearner

STEP, MEGABYTE = 0.05, 1e6
"""Seconds to compute a first chunk, and bytes of any chunk: only their ratios matter."""

TITLE = "Known, wrong and unknown costs"

LEGEND = (
    "Seconds to the first token over those of the better single method, and over those of the best split whose suffix comes "
    "after all else: median\\90th percentile\\greatest over all settings; ! above 1.02 with known costs. Holes are not stored."
)

NEVER_SLOWER = 1.02


@dataclass(frozen=True)
class Belief:
    """What is believed before the first prompt.

    Attributes:
        name: of it.
        compute, load: how many times as dear as it is a side is believed to be.
        prompts: the last of so many prompts in a row counts; beliefs are corrected between them.
        known: whether anything is believed.
    """

    name: str
    compute: float = 1.0
    load: float = 1.0
    prompts: int = 1
    known: bool = True

    def learner(self, setting: Setting) -> CostLearner:
        """Returns what somebody has learnt who believes so."""
        if not self.known:
            return CostLearner()
        dear = tuple(seconds * self.compute for seconds in setting.compute)
        path = {"bandwidth": setting.bandwidth / self.load, "latency": setting.latency * self.load}
        return learnt(replace(setting, compute=dear, **path))  # type: ignore[arg-type]


BELIEFS = (
    Belief("all costs known"),
    Belief("loading believed 2x too dear", load=2.0),
    Belief("loading believed 2x too cheap", load=0.5),
    Belief("computing believed 2x too dear", compute=2.0),
    Belief("computing believed 2x too cheap", compute=0.5),
    Belief("nothing known", known=False),
    Belief("loading believed 10x too dear, third prompt", load=10.0, prompts=3),
    Belief("loading believed 10x too cheap, third prompt", load=0.1, prompts=3),
)


@dataclass(frozen=True)
class Row:
    """One belief over all settings; one ratio per setting."""

    belief: Belief
    over_single: tuple[float, ...]
    over_best: tuple[float, ...]

    def cells(self) -> list[str]:
        """Returns what a table shows."""
        right = self.belief == BELIEFS[0]
        missed = "!" if right and max(self.over_single) > NEVER_SLOWER else ""
        return [self.belief.name, str(len(self.over_best)), three(self.over_single) + missed, three(self.over_best)]

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        single, best = list(self.over_single), list(self.over_best)
        return {"belief": self.belief.name, "over_single": single, "over_best": best}


def settings() -> Iterator[Setting]:
    """Returns 168 settings: loading takes from a tenth to ten times what computing takes, with and without holes."""
    ratios = (0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 10.0)
    for chunks, ratio, threads, waits, has_holes in product((8, 32, 64), ratios, (1, 2), (0.0, 0.5), (False, True)):
        costs = steps(chunks, STEP, 0.02 * STEP)
        seconds = ratio * sum(costs) / chunks
        yield Setting(
            costs,
            MEGABYTE,
            MEGABYTE / seconds,
            latency=waits * seconds,
            threads=threads,
            suffix=STEP / 5,
            holes=(chunks // 2, chunks - 2) if has_holes else (),
        )


def table(where: Sequence[Setting], tick: Callable[[], None] = lambda: None) -> list[Row]:
    """Returns each belief in each of the settings.

    Args:
        where: the settings.
        tick: called after each row.
    """
    singles = [min(simulate(one, "compute").seconds, simulate(one, "load").seconds) for one in where]
    rows = []
    for belief in BELIEFS:
        taken = [simulate_prompts([one] * belief.prompts, belief.learner(one))[-1].seconds for one in where]
        over_single = tuple(seconds / single for seconds, single in zip(taken, singles, strict=True))
        over_best = tuple(seconds / best_seconds(one) for seconds, one in zip(taken, where, strict=True))
        rows.append(Row(belief, over_single, over_best))
        tick()
    return rows


def sheet(rows: Sequence[Row]) -> Sheet:
    """Returns the table for people."""
    return Sheet(
        TITLE, ("<belief", "n", "over the better single", "over the best split"), [row.cells() for row in rows]
    )


def three(values: Sequence[float]) -> str:
    """Returns median, 90th percentile and greatest."""
    ordered = sorted(values)
    return f"{median(ordered):.3f}\\{ordered[int(0.9 * (len(ordered) - 1))]:.3f}\\{ordered[-1]:.3f}"
