"""A trace on the simulator, over bandwidths: times to the first token, throughput, and what each method loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample
from benchmarks.traces.methods import BOTH, COMPUTE, Visit, methods, visits_of
from benchmarks.traces.queueing import loads_ahead, one_by_one, scaled_arrivals, spread, waits
from benchmarks.traces.requests import BLOCK, Trace, statistics_of
from benchmarks.traces.serving import Serving

BANDWIDTHS = (7.0, 25.0, 32.0, 56.0, 100.0)
"""Those of the paper, in 10^9 bits per second."""

CLASSES = (1, 2_048, 8_192, 32_768)
"""Stored tokens from which a class of requests begins."""

SLOWER = 1.05
"""A request counts as slower than need be above this many times its best method."""

NEVER_SLOWER = 1.02


@dataclass(frozen=True)
class Replay:
    """How traces are replayed.

    Attributes:
        serving: model and GPUs; its bandwidth is replaced by each of these.
        bandwidths: 10^9 bits per second.
        thresholds: stored tokens from which a threshold loads.
        gib: size of the store; None for no limit.
        load: share of the device that computing everything would use.
        warm: so many requests at the beginning only fill the store; nothing is measured of them.
    """

    serving: Serving
    bandwidths: Sequence[float] = BANDWIDTHS
    thresholds: Sequence[int] = ()
    gib: float | None = None
    load: float = 0.7
    warm: int = 0

    def run(self, trace: Trace, tick: Callable[[], None] = lambda: None) -> Result:
        """Returns what became of a trace.

        Raises:
            ValueError: its blocks are not those of the cost curves, or a number is out of range.
        """
        if trace.block != BLOCK:
            raise ValueError(f"The cost curves are for blocks of {BLOCK} tokens, the trace has {trace.block}.")
        if self.warm >= len(trace.requests):
            raise ValueError(
                f"{trace.name} has {len(trace.requests)} requests; {self.warm} that only fill the store leave none."
            )
        capacity = None if self.gib is None else self.serving.blocks_in(self.gib)
        cells, figures = [], {}
        for gbps in self.bandwidths:
            visits = visits_of(trace, replace(self.serving, gbps=gbps), capacity, self.warm)
            cells.append(self._cell(gbps, visits))
            ratios = [visit.both / visit.better for visit in visits]
            total = sum(visit.both for visit in visits) / sum(visit.better for visit in visits)
            label = f"TTFT over the better of computing and loading, {gbps:g} Gbps"
            low, high = Sample(tuple(ratios)).spread
            figures[f"over_better_{gbps:g}"] = Figure(label, total, low, high, "x", Goal(NEVER_SLOWER))
            tick()
        details = {
            "trace": asdict(statistics_of(trace)),
            "serving": self.serving.name,
            "load": self.load,
            "gib": self.gib,
            "warm": self.warm,
            "measured": len(trace.requests) - self.warm,
            "cells": cells,
        }
        return Result(f"{trace.name}, {self.serving.name}", figures, details)

    def _cell(self, gbps: float, visits: Sequence[Visit]) -> dict[str, Any]:
        arrivals = scaled_arrivals(visits, self.load)
        tokens = sum(visit.tokens for visit in visits)
        return {
            "gbps": gbps,
            "hit_share": sum(visit.hits for visit in visits) / tokens,
            "methods": {name: _method(name, visits, arrivals) for name in methods(self.thresholds)},
            "regret": {name: regret(visits, name) for name in methods(self.thresholds)},
            "classes": [
                {"from": least, "requests": len(some), "regret": {m: regret(some, m) for m in methods(self.thresholds)}}
                for least, some in by_class(visits)
                if some
            ],
        }


def _method(name: str, visits: Sequence[Visit], arrivals: Sequence[float]) -> dict[str, Any]:
    taken = [visit.seconds(name) for visit in visits]
    found: dict[str, Any] = {
        "alone": spread(taken),
        "queued": spread(waits(arrivals, one_by_one(arrivals, taken))),
        "per_second": len(visits) / sum(taken),
    }
    if name not in (COMPUTE, BOTH):
        at_once = [0.0] * len(visits)
        found["ahead"] = {
            "queued": spread(waits(arrivals, loads_ahead(arrivals, visits, name))),
            "per_second": len(visits) / max(loads_ahead(at_once, visits, name)),
        }
    return found


def regret(visits: Sequence[Visit], method: str) -> dict[str, float]:
    """Returns what a method loses against the best method of each request, the better single one or both ends.

    Returns:
        mean: all its seconds over all the best ones, less 1; p99: of the single requests' ratios, less 1; slower: the share of
        the requests that are more than 5 % slower.
    """
    taken = [(visit.seconds(method), min(visit.better, visit.both)) for visit in visits]
    ratios = [seconds / best for seconds, best in taken]
    return {
        "mean": sum(seconds for seconds, _ in taken) / sum(best for _, best in taken) - 1,
        "p99": spread(ratios)["p99"] - 1,
        "slower": sum(ratio > SLOWER for ratio in ratios) / len(ratios),
    }


def by_class(visits: Sequence[Visit]) -> list[tuple[int, list[Visit]]]:
    """Returns the requests of which anything is stored, by how much."""
    ends = (*CLASSES[1:], float("inf"))
    return [
        (begin, [one for one in visits if begin <= one.hits < end]) for begin, end in zip(CLASSES, ends, strict=True)
    ]
