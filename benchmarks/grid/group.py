"""All cells of one model, one length and one share of the device: every arm takes its turn in every round.

Arms without a store (recomputing with transformers alone, compute-only) are shared by the cells. A cache learns what
computing and loading cost, cell by cell; so in the first round it knows less than in the others, as with a new store, and the
median is that of a store in use.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from benchmarks.cells import Costs, Goals, cell_figures, seconds_per_load, ttft
from benchmarks.figures import Figure, Goal
from benchmarks.grid.axes import BITS_PER_BYTE, GIGA, Source
from benchmarks.grid.competition import Competition
from benchmarks.grid.peers import FORMATS, SavedCache
from benchmarks.timing import Sample, interleave
from benchmarks.workbench import Run, Workbench, median_parts
from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore
from cake_hf.stores.memory import MemoryStore
from cake_hf.testing import ThrottledStore, WrapperStore

GOALS = {
    "cpu": Goals(ratio=Goal(1.05), eta=Goal(0.90, at_most=False)),
    "cuda": Goals(ratio=Goal(1.02), eta=Goal(0.95, at_most=False)),
}
"""Two cores are noisier than a GPU."""

FEW_CHUNKS = 8
"""With fewer chunks a split cannot be fine enough to come near the limit; eta is shown without a goal."""
WORTH_USING = 0.9
"""Both sides are worth using if the best split takes at most this part of the better one alone."""

TURN_SECONDS = {"cpu": 1.0, "cuda": 0.3}
"""The least time for one turn of an arm, unless that takes MOST_RUNS."""
MOST_RUNS = 9
BESIDE_OTHERS = 3
"""Turns beside a competing load are this many times as long: there, two equal runs differ by a third."""


@dataclass(frozen=True)
class Opened:
    """A source that can be read from.

    Attributes:
        source: what it stands for.
        store: ours. Each cell has a wrapper of its own, since what is learned about its costs is remembered with it.
        bytes_per_second: of the throttle; None for none.
        held: the peers' files by format, if they come from memory.
    """

    source: Source
    store: Store
    bytes_per_second: float | None = None
    held: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class Point:
    """A group's place on the axes."""

    shape: str
    tokens: int
    chunks: int
    share: float

    def __str__(self) -> str:
        share = "" if self.share == 1 else f", {self.share:.0%} of the device"
        return f"{self.shape}, {self.tokens:,} tokens{share}"


@dataclass(frozen=True)
class Cell:
    """One source within a group.

    Attributes:
        source: its name.
        gbps: 10^9 bits per second of the throttle, or as measured in load-only runs.
        throttled: whether it is the throttle's.
        figures: by a short name; peers' among them.
        details: JSON-ready. A throttle may allow more than its store, or this Python, can read: `reached_gbps` is what
            load-only runs came to, and `eta_as_reached` is eta with T* for that rate.
    """

    source: str
    gbps: float
    throttled: bool
    figures: dict[str, Figure]
    details: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        plain = {"source": self.source, "gbps": self.gbps, "throttled": self.throttled, **self.details}
        return {**plain, **{name: figure.as_dict() for name, figure in self.figures.items()}}


@dataclass(frozen=True)
class Group:
    """The results of a group.

    Attributes:
        point: on the axes.
        figures: of the arms shared by all cells, and the share of the device that was really left.
        cells: one per source.
        costs: those that T* was computed from.
        timeline: the actors' work in the median run of the cell where both ends help most.
        failure: empty, or why there are no cells.
    """

    point: Point
    figures: dict[str, Figure] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    costs: Costs | None = None
    timeline: dict[str, object] = field(default_factory=dict)
    failure: str = ""

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        point = {name: getattr(self.point, name) for name in ("shape", "tokens", "chunks", "share")}
        shared = {name: figure.as_dict() for name, figure in self.figures.items()}
        cells = [cell.as_dict() for cell in self.cells]
        costs = None if self.costs is None else asdict(self.costs)
        return {**point, **shared, "cells": cells, "costs": costs, "timeline": self.timeline, "failure": self.failure}


def open_sources(
    sources: Sequence[Source],
    disk: LocalStore,
    memory: MemoryStore | None,
    rates: Mapping[float, float],
    saved: SavedCache | None,
    throttled: Store | None = None,
) -> list[Opened]:
    """Yields stores for the cells of one group.

    Args:
        sources: of the cells.
        disk, memory: filled stores; memory is needed if it is among the sources.
        rates: bytes per second of the throttles that are relative to computing.
        saved: the peers' files, if they are to be measured.
        throttled: what is behind the throttles; the disk unless told otherwise.
    """
    opened = []
    for source in sources:
        if source.kind == "memory":
            assert memory is not None
            opened.append(Opened(source, WrapperStore(memory), None, saved.in_memory() if saved else None))
        elif source.kind == "disk":
            opened.append(Opened(source, WrapperStore(disk)))
        else:
            rate = rates[source.amount] if source.kind == "times" else source.amount * GIGA / BITS_PER_BYTE
            opened.append(Opened(source, ThrottledStore(throttled or disk, rate), rate))
    return opened


def goals_for(device: str, chunks: int, limit_over_alone: float) -> Goals:
    """Returns the goals of a cell.

    Args:
        device: as torch names it.
        chunks: of the prefix.
        limit_over_alone: T* over the time of the better single method.
    """
    goals = GOALS[_kind(device)]
    worth_judging = chunks >= FEW_CHUNKS and limit_over_alone <= WORTH_USING
    return goals if worth_judging else Goals(ratio=goals.ratio)


def _kind(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"


def arm_count(sources: int, *, peers: bool, competing: bool) -> int:
    """Returns how many runs a round of a group has."""
    return 2 + (1 if peers else 0) + competing + sources * (2 + (len(FORMATS) if peers else 0))


def measure(
    bench: Workbench,
    point: Point,
    sources: Sequence[Opened],
    saved: SavedCache | None,
    others: Competition,
    step: Callable[[str], None],
) -> Group:
    """Runs all rounds of a group.

    Args:
        bench: with the group's prompt.
        point: on the axes.
        sources: of the cells.
        saved: the peers' files; None to leave the peers out.
        others: the competing processes, which leave the group's share of the device.
        step: called with the name of the next run.

    Raises:
        CakeError: a run did something else than it should, so its time would mean nothing.
    """
    arms = {**_shared_arms(bench, peers=saved is not None), **_cell_arms(bench, sources, saved)}
    seconds = TURN_SECONDS[_kind(bench.settings.device)] * (BESIDE_OTHERS if point.share < 1 else 1)
    told = {name: partial(_turn, name, Steadied(arm, seconds), others, step) for name, arm in arms.items()}
    if point.share < 1:
        told["alone"] = partial(_told, "alone", lambda: bench.plain_run("alone"), step)
    runs = interleave(told, bench.settings.repeats)
    costs = Costs.of(runs["compute"], bench.chunk_bytes())
    cells = [_cell(opened, runs, costs, bench) for opened in sources]
    return Group(point, _shared_figures(runs), cells, costs, _timeline(cells, runs))


class Steadied:
    """An arm with turns of some length: a short run, which any hiccup doubles, is repeated, and the median run counts.

    The first turn has a single run, since a cache is to know little of the costs there.

    Args:
        arm: one run.
        seconds: of a turn.
    """

    def __init__(self, arm: Callable[[], Run], seconds: float) -> None:
        self._arm = arm
        self._seconds = seconds
        self._first = True

    def __call__(self) -> Run:
        runs = [self._arm()]
        while (
            not self._first and len(runs) < MOST_RUNS and sum(run.first_token_seconds for run in runs) < self._seconds
        ):
            runs.append(self._arm())
        self._first = False
        return sorted(runs, key=lambda run: run.first_token_seconds)[len(runs) // 2]


def _turn(name: str, arm: Callable[[], Run], others: Competition, step: Callable[[str], None]) -> Run:
    with others.working():
        return _told(name, arm, step)


def _told(name: str, arm: Callable[[], Run], step: Callable[[str], None]) -> Run:
    step(name)
    return arm()


def _shared_arms(bench: Workbench, *, peers: bool) -> dict[str, Callable[[], Run]]:
    disk = WrapperStore(bench.filled_store())
    arms: dict[str, Callable[[], Run]] = {
        "plain": bench.plain_run,
        "compute": lambda: bench.cake_run(disk, "compute-only", strategy="compute"),
    }
    if peers:
        arms["one forward"] = lambda: bench.one_forward_run("one forward")
    return arms


def _cell_arms(bench: Workbench, sources: Sequence[Opened], saved: SavedCache | None) -> dict[str, Callable[[], Run]]:
    arms: dict[str, Callable[[], Run]] = {}
    for opened in sources:
        for strategy in ("load", "both"):
            name = f"{strategy} {opened.source}"
            arms[name] = partial(bench.cake_run, opened.store, name, strategy=strategy)
        for kind in FORMATS if saved else ():
            assert saved is not None
            name = f"{kind} {opened.source}"
            load = saved.loader(kind, opened.bytes_per_second, opened.held[kind] if opened.held else None)
            arms[name] = partial(bench.timed, load, name)
    return arms


def _shared_figures(runs: Mapping[str, Sequence[Run]]) -> dict[str, Figure]:
    plain = ttft(runs["plain"])
    figures = {
        "plain_seconds": Figure.of("DynamicCache, by chunks", plain),
        "compute_seconds": Figure.of("compute-only", ttft(runs["compute"])),
        "compute_over_plain": Figure.ratio("compute-only over DynamicCache, by chunks", ttft(runs["compute"]), plain),
    }
    if "one forward" in runs:
        figures["one_forward_seconds"] = Figure.of("DynamicCache, one forward", ttft(runs["one forward"]))
    if "alone" in runs:
        figures["share_left"] = Figure.ratio("share of compute left", ttft(runs["alone"]), plain)
    return figures


def _cell(opened: Opened, runs: Mapping[str, Sequence[Run]], costs: Costs, bench: Workbench) -> Cell:
    compute, rate = ttft(runs["compute"]), opened.bytes_per_second
    load_runs, both_runs = runs[f"load {opened.source}"], runs[f"both {opened.source}"]
    loaded = seconds_per_load(load_runs)
    per_load = costs.chunk_bytes / rate if rate else loaded
    limit, alone = costs.limit(per_load), costs.alone(per_load)
    goals = goals_for(bench.settings.device, bench.settings.chunks, limit / alone)
    figures = cell_figures(compute, ttft(load_runs), ttft(both_runs), limit, goals)
    for kind in FORMATS:
        if f"{kind} {opened.source}" in runs:
            figures[f"{kind}_seconds"] = Figure.of(f"saved with {kind}", ttft(runs[f"{kind} {opened.source}"]))
    better = min(compute, ttft(load_runs), key=lambda sample: sample.median)
    details = {
        "reached_gbps": costs.chunk_bytes / loaded * BITS_PER_BYTE / GIGA,
        "eta_as_reached": costs.limit(max(per_load, loaded)) / ttft(both_runs).median,
        "limit_over_alone": limit / alone,
        "first_round_ratio": both_runs[0].seconds / better.median,
        "chunks_computed": statistics.median(len(run.spans()) for run in both_runs),
        "parts": median_parts(both_runs),
        "rounds": {name: _rounded(ttft(found)) for name, found in (("load", load_runs), ("both", both_runs))},
    }
    gbps = costs.chunk_bytes / per_load * BITS_PER_BYTE / GIGA
    return Cell(str(opened.source), gbps, rate is not None, figures, details)


def _timeline(cells: Sequence[Cell], runs: Mapping[str, Sequence[Run]]) -> dict[str, object]:
    def of_the_better(cell: Cell) -> float:
        share = cell.details["limit_over_alone"]
        return share if isinstance(share, float) else 1.0

    cell = min(cells, key=of_the_better)
    found = sorted(runs[f"both {cell.source}"], key=lambda run: run.seconds)
    run = found[len(found) // 2]
    return {
        "source": cell.source,
        "gbps": cell.gbps,
        "seconds": run.report.prefill_seconds,
        "spans": run.report.as_dict()["timeline"],
    }


def _rounded(sample: Sample) -> list[float]:
    return [round(value, 6) for value in sample.values]
