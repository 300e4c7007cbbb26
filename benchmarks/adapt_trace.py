"""Watches a cache from prompt to prompt: what it believes before each, and what each then measures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.timing import Sample
from benchmarks.workbench import Run, Workbench, remove
from cake_hf.stores.local import LocalStore
from cake_hf.stores.marker import NOTES
from cake_hf.testing import ThrottledStore
from cake_hf.transfer.cost_notes import CostMemory

Plain = dict[str, object]


class SlowStore(ThrottledStore):
    """A directory behind a slow line. What is learned about it is kept in the directory, as without that line."""

    counts_hits = False

    def notes_folder(self) -> Path | None:
        return self.inner.notes_folder()

    def leaves_traces(self) -> bool:
        """Lets caches that save nothing keep what they learn, which is what is measured here; by default they keep nothing."""
        return True


@dataclass(frozen=True)
class Prompted:
    """One prompt of a watched cache.

    Attributes:
        arm: the name of the cache.
        turn: how many times the case was run before.
        phase: the state of the machine or the store.
        believed: the costs before it; see `beliefs`.
        run: the result.
    """

    arm: str
    turn: int
    phase: str
    believed: Plain
    run: Run

    @property
    def computed(self) -> int:
        """The number of chunks that the main thread computed."""
        return self.run.report.chunks_computed

    def as_dict(self) -> Plain:
        """Returns it as JSON-ready values. A row of `computed`, `left` and `loaded` is a chunk, when it was started, and the
        seconds it took.

        A forward that was `left` (preempted) had not computed its chunk; its seconds are those until then. Loads that run at
        the same time share the line, so that one takes longer than `load_interval`; arrivals are that far apart.
        """
        rows: dict[str, list[list[float]]] = {"computed": [], "preempted": [], "loaded": []}
        for span in self.run.report.timeline:
            if span.chunk >= 0 and span.outcome in rows:
                rows[span.outcome].append([span.chunk, round(span.start, 6), round(span.end - span.start, 6)])
        about = {"arm": self.arm, "turn": self.turn, "phase": self.phase, "seconds": self.run.seconds}
        return {**about, "believed": self.believed, **rows}


class Watched:
    """A store object of its own over a directory of its own; each prompt runs through a new cache on it.

    Args:
        bench: of the run.
        name: for the trace.
        folder: holds the chunks, and what was learned about them so far; removed at the end.
        rate: bytes per second.
        trace: the list that every prompt is added to.
        turn: see `Prompted`.
    """

    def __init__(
        self, bench: Workbench, name: str, folder: Path, rate: float, trace: list[Prompted], turn: int = 0
    ) -> None:
        self.folder = folder
        self._bench, self._name, self._trace, self._turn = bench, name, trace, turn
        self._ends = ExitStack()
        self._ends.callback(remove, folder)
        self.store = SlowStore(LocalStore(folder, budget=None), rate)
        self._ends.callback(self.store.close)
        with closing(bench.session(self.store)) as session:
            self._memory = session.cost_memory(session.bound_model.namespace())
            self._chunk_bytes = session.bound_model.layout().nbytes

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()

    def prompt(self, phase: str) -> Prompted:
        """Answers the prompt once."""
        believed = beliefs(self._memory, self._chunk_bytes)
        run = self._bench.cake_run(self.store, f"{self._name}, {phase}")
        self._trace.append(Prompted(self._name, self._turn, phase, believed, run))
        return self._trace[-1]

    def prompts(self, phase: str, count: int) -> list[Prompted]:
        """Answers the prompt this many times."""
        return [self.prompt(phase) for _ in range(count)]


def beliefs(memory: CostMemory, chunk_bytes: int) -> Plain:
    """Returns what a cache believes, JSON-ready, in seconds; None for what it does not know.

    `compute_base + compute_slope * i` is the time to compute chunk i; `load_seconds` that of one load by itself;
    `load_interval` the time between two arrivals of `load_threads` concurrent loads; `credit` the time of restores since
    something was tried.
    """
    costs = memory.costs(chunk_bytes)
    compute, load = costs.compute, costs.load
    return {
        "compute_base": None if compute is None else compute.base,
        "compute_slope": None if compute is None else compute.slope,
        "load_seconds": None if load is None else load.seconds,
        "load_interval": None if load is None else load.interval,
        "load_threads": None if load is None else load.threads,
        "credit": memory.effort()["credit"],
    }


def copy_of(root: Path, bench: Workbench, *, notes: bool) -> Path:
    """Makes a new directory with the same chunks.

    Args:
        root: of a store.
        bench: of the run.
        notes: also copy what was learned.
    """
    ignore = None if notes else shutil.ignore_patterns(NOTES)
    return Path(shutil.copytree(root, bench.fresh_folder() / "store", ignore=ignore))


def in_turns(arms: Mapping[str, Callable[[], Prompted]], rounds: int) -> dict[str, list[Prompted]]:
    """Gives every cache a prompt per round; each round starts with another cache. No run is repeated, since a cache learns
    from each."""
    names = list(arms)
    found: dict[str, list[Prompted]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(arms[name]())
    return found


def seconds(prompts: Sequence[Prompted]) -> Sample:
    """Returns the seconds of each prompt."""
    return Sample(tuple(prompted.run.seconds for prompted in prompts))


def computed(prompts: Sequence[Prompted]) -> Sample:
    """Returns the number of computed chunks of each prompt."""
    return Sample(tuple(float(prompted.computed) for prompted in prompts))
