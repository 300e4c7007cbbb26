"""Runs the whole grid, group by group: makes models and stores, keeps to the time, and says what was left out."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoding
from benchmarks.cells import calibrate
from benchmarks.figures import Result
from benchmarks.grid import exactness
from benchmarks.grid.axes import Axes
from benchmarks.grid.competition import Competition
from benchmarks.grid.exactness import Exactness, Examination
from benchmarks.grid.group import Group, Point, arm_count, measure, open_sources
from benchmarks.grid.peers import SavedCache
from benchmarks.grid.summary import summarise
from benchmarks.machine import Machine
from benchmarks.models import build_model, build_prompt
from benchmarks.workbench import Parity, Workbench, cheap_collections
from cake_hf.errors import CakeError
from cake_hf.stores.memory import MemoryStore
from cake_hf.util.redaction import shown

Step = Callable[[str], None]

SET_UP_STEPS = 2
"""For each shape: making the model, filling the stores."""


@dataclass
class Grid:
    """The results of a grid, growing while it runs.

    Attributes:
        axes: of it.
        machine: that ran it.
        exactness: by shape, if asked for.
        groups: those that were measured, or failed.
        decoding: by shape, if asked for.
        left_out: names of the groups that there was no time for.
        parity: of the timed runs of each bench.
        seconds: so far.
    """

    axes: Axes
    machine: Machine
    exactness: dict[str, Exactness] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    decoding: dict[str, Result] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    parity: dict[str, Parity] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Returns whatever differed from what was computed plainly, and what could not be measured."""
        wrong = [f"{shape}: {what}" for shape, found in self.exactness.items() for what in found.wrong]
        wrong += [f"{point}: {what}" for point, parity in self.parity.items() for what in parity.mismatches]
        wrong += [f"{group.point}: {group.failure}" for group in self.groups if group.failure]
        return wrong + [
            f"{shape}, decoding: {found.failure}" for shape, found in self.decoding.items() if found.failure
        ]

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {
            "machine": self.machine.as_dict(),
            "axes": self.axes.as_dict(),
            "loader_threads": self.axes.settings(self.axes.shapes[0]).limits.loader_threads,
            "exactness": {shape: found.as_dict() for shape, found in self.exactness.items()},
            "groups": [group.as_dict() for group in self.groups],
            "decoding": {shape: result.as_dict() for shape, result in self.decoding.items()},
            "left_out": self.left_out,
            "parity": {point: parity.as_dict() for point, parity in self.parity.items()},
            "summary": summarise(self.groups),
            "faults": self.faults,
            "seconds": self.seconds,
        }


def step_count(axes: Axes) -> int:
    """Returns how often `run` calls `step` if nothing is left out."""
    per_round = [
        arm_count(len(axes.sources), peers=axes.peers, competing=share < 1)
        for share in axes.shares
        for _ in axes.lengths
    ]
    per_shape = sum(per_round) * axes.repeats + SET_UP_STEPS + axes.decode
    if axes.parity:
        per_shape += exactness.runs_of(_examined(axes) // axes.chunk_size)
    return per_shape * len(axes.shapes)


def run(axes: Axes, parent: Path | None, step: Step, keep: Callable[[Grid], None]) -> Grid:
    """Measures the grid.

    Args:
        axes: of it.
        parent: the directory to make stores in; None for the system's own temporary one.
        step: called with the name of the next run.
        keep: called with the grid so far, after each group.
    """
    grid = Grid(axes, Machine(axes.device))
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    clock = GroupClock(axes.minutes)
    for shape in axes.shapes:
        with tempfile.TemporaryDirectory(prefix="cake-bench-", dir=parent) as folder, cheap_collections():
            for _ in _Shape(grid, shape, Path(folder), clock, step).measured():
                grid.seconds = clock.seconds
                keep(grid)
        gc.collect()  # the model must go before the next one is made
    grid.seconds = clock.seconds
    keep(grid)
    return grid


class GroupClock:
    """Knows whether there is time for one more group, from how long others of its shape took.

    Args:
        minutes: the limit; 0 for none.
        clock: monotonic seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._end = minutes * 60 or math.inf
        self._timed: list[tuple[Point, float]] = []

    @property
    def seconds(self) -> float:
        """Returns the seconds since the start."""
        return self._clock() - self._begin

    def allows(self, point: Point) -> bool:
        """Returns whether a group can be expected to be done in time.

        The expected time is that of a group of the same length, or else of the last one of its shape, in proportion to the
        prompt; longer, if its share of the device is less. The longest groups come first; shorter ones rather take less than
        in proportion.
        """
        of_shape = [timed for timed in self._timed if timed[0].shape == point.shape]
        if not of_shape:
            return self.seconds <= self._end
        of_length = [timed for timed in of_shape if timed[0].tokens == point.tokens]
        known, seconds = (of_length or of_shape)[-1]
        longer = point.tokens / known.tokens * max(1.0, known.share / point.share)
        return self.seconds + seconds * longer <= self._end

    def timed(self, measure: Callable[[], Group]) -> Group:
        """Measures a group, and learns how long it took, unless it failed."""
        begin = self.seconds
        group = measure()
        if not group.failure:
            self._timed.append((group.point, self.seconds - begin))
        return group


class _Shape:
    """All groups of one model."""

    def __init__(self, grid: Grid, shape: str, folder: Path, clock: GroupClock, step: Step) -> None:
        self._grid, self._axes, self._name = grid, grid.axes, shape
        self._folder, self._clock, self._tell = folder, clock, step
        settings = grid.axes.settings(shape)
        self._tell(f"{shape}: making the model")
        self._longest = Workbench(settings, build_model(settings), build_prompt(settings), folder)
        self._saved: dict[int, SavedCache] = {}
        self._rates: dict[int, dict[float, float]] = {}

    def measured(self) -> Iterator[None]:
        """Measures one thing after the other; yields after each."""
        self._tell(f"{self._name}: filling the stores")
        self._longest.filled_store()
        self._grid.parity[f"{self._name}, filling"] = self._longest.parity
        if self._axes.parity:
            self._examine()
            yield
        memory = self._memory()
        for share in self._axes.shares:
            with Competition(share, self._axes.device) as others:
                for point in self._points(share):
                    if self._clock.allows(point):
                        group = self._clock.timed(partial(self._group, point, memory, others))
                        self._grid.groups.append(group)
                    else:
                        self._grid.left_out.append(str(point))
                    yield
        if self._axes.decode:
            self._tell(f"{self._name}: decoding")
            self._grid.decoding[self._name] = self._decoded()
            yield

    def _points(self, share: float) -> Iterator[Point]:
        for tokens in reversed(self._axes.lengths):
            yield Point(self._name, tokens, tokens // self._axes.chunk_size, share)

    def _group(self, point: Point, memory: MemoryStore | None, others: Competition) -> Group:
        bench = self._longest.shorter(point.tokens)
        self._grid.parity[str(point)] = bench.parity
        try:
            saved = self._saved_cache(bench) if self._axes.peers else None
            rates = self._calibrated(bench)
            behind = memory if self._axes.throttled == "memory" else None
            sources = open_sources(self._axes.sources, bench.filled_store(), memory, rates, saved, behind)
            return measure(bench, point, sources, saved, others, lambda name: self._tell(f"{point}: {name}"))
        except (CakeError, torch.OutOfMemoryError) as error:
            return Group(point, failure=shown(error))

    def _calibrated(self, bench: Workbench) -> dict[float, float]:
        """Returns the bandwidths of the throttles that are relative to computing, the same for every share of the device."""
        tokens, wanted = bench.settings.tokens, [s.amount for s in self._axes.sources if s.kind == "times"]
        if tokens not in self._rates:
            self._rates[tokens] = calibrate(bench, wanted) if wanted else {}
        return self._rates[tokens]

    def _saved_cache(self, bench: Workbench) -> SavedCache:
        tokens = bench.settings.tokens
        if tokens not in self._saved:
            self._saved[tokens] = SavedCache(bench, bench.fresh_folder())
        return self._saved[tokens]

    def _memory(self) -> MemoryStore | None:
        """Returns a copy of the full store in memory, if that is asked for."""
        if not self._axes.needs_memory:
            return None
        disk = self._longest.filled_store()
        memory = MemoryStore(self._longest.settings.chunks * self._longest.chunk_bytes())
        for key in disk.keys():  # noqa: SIM118  # a store is no mapping
            memory.write(key, [disk.read(key) or b""])
        return memory

    def _examine(self) -> None:
        examination = Examination(self._longest.shorter(_examined(self._axes)))
        self._grid.exactness[self._name] = examination.found
        for name in examination.steps():
            self._tell(f"{self._name}, exactness: {name}")

    def _decoded(self) -> Result:
        try:
            return decoding.measure(self._longest)
        except (CakeError, torch.OutOfMemoryError) as error:
            return Result("Decoding", {}, failure=shown(error))


def _examined(axes: Axes) -> int:
    """Returns the tokens of the prompt that exactness is examined with: few, since every meeting point is a run."""
    return min(exactness.CHUNKS * axes.chunk_size, axes.lengths[-1])
