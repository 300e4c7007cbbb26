"""How near does a full hit come to the bare disk? Everything stored, nothing throttled.

The floor is what nobody can do without: reading the files' bytes (`preadv`, into memory that is there already, with as many
threads as there are loaders) and running the prompt's last piece. What comes on top is ours: naming the chunks, the lookup,
fresh memory for the KV (the kernel clears each page of it), checksums, threads. The files were written a moment ago, so
they come from the page cache for both.

Before anything loaded is used, a short forward tells whether the model computes what it did (`model.behaviour`). It runs beside
the loads; what it costs all the same is seen beside prompts that take a remembered answer instead.

The same prompt load-only shows what starting to compute at all costs here: with a store this fast, the best split is to
compute nothing, and a computed chunk that is done after the last load makes everybody wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from benchmarks.bare import read_file
from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample, interleave
from benchmarks.workbench import Run, Workbench, median_parts
from cake_hf.model.behaviour import Kept, behaviour

NEVER_SLOWER = Goal(1.02)
NEAR_THE_FLOOR = Goal(1.1)
NOTHING_COMPUTED = Goal(0)
ASKING = Goal(1.02)


def measure(bench: Workbench) -> Result:
    """Time full hits and bare reads, interleaved."""
    store, answer = bench.filled_store(), behaviour(bench.model)
    with ThreadPoolExecutor(bench.settings.limits.loader_threads) as threads:
        read = _reader(threads, sorted(store.root.glob("??/*")))
        arms: dict[str, Callable[[], _Round]] = {
            "read": lambda: _Round(read()),
            "both": lambda: _Round.of(bench.cake_run(store, "fully cached")),
            "load": lambda: _Round.of(bench.cake_run(store, "fully cached, load-only", strategy="load")),
            "unasked": lambda: _Round.of(_told(answer, lambda: bench.cake_run(store, "fully cached"))),
        }
        rounds = interleave(arms, bench.settings.repeats)
    times = {name: Sample(tuple(one.seconds for one in found)) for name, found in rounds.items()}
    both, load = ([one.run for one in rounds[name] if one.run is not None] for name in ("both", "load"))
    tails = Sample(tuple(run.tail_seconds for run in load))
    computed = Sample(tuple(float(run.report.chunks_computed) for run in both))
    floor = Sample(tuple(r + t for r, t in zip(times["read"].values, tails.values, strict=True)))
    return Result(
        "Fully cached on the unthrottled local store",
        {
            "read_seconds": Figure.of("reading the bytes", times["read"]),
            "suffix_seconds": Figure.of("the suffix, always computed", tails),
            "seconds": Figure.of("first token", times["both"]),
            "load_seconds": Figure.of("first token, load-only", times["load"]),
            "over_read": Figure.ratio("first token over reading", times["both"], times["read"]),
            "over_floor": Figure.ratio("first token over reading + suffix", times["both"], floor, NEAR_THE_FLOOR),
            "load_over_floor": Figure.ratio("load-only over the same floor", times["load"], floor, NEAR_THE_FLOOR),
            "computed_chunks": Figure.of("chunks computed all the same", computed, "chunks", NOTHING_COMPUTED),
            "over_unasked": Figure.ratio(
                "first token over one without the short forward", times["both"], times["unasked"], ASKING
            ),
            "over_load": Figure.ratio("first token over load-only", times["both"], times["load"], NEVER_SLOWER),
        },
        {"parts": median_parts(both), "load_parts": median_parts(load)},
    )


@dataclass(frozen=True)
class _Round:
    """What an arm came to in one round.

    Attributes:
        seconds: that it took.
        run: behind them, for a closer look; None for bare reads.
    """

    seconds: float
    run: Run | None = None

    @classmethod
    def of(cls, run: Run) -> _Round:
        return cls(run.seconds, run)


def _told(answer: Kept, run: Callable[[], Run]) -> Run:
    """A run that takes this for what the short forward gives."""
    with patch("cake_hf.restore.bound_model.behaviour", lambda model: answer):
        return run()


def _reader(threads: ThreadPoolExecutor, paths: Sequence[Path]) -> Callable[[], float]:
    """A function that reads all files into the same memory each time, and returns the seconds."""
    memory = [[memoryview(bytearray(path.stat().st_size))] for path in paths]

    def read() -> float:
        begin = time.perf_counter()
        list(threads.map(read_file, paths, memory))
        return time.perf_counter() - begin

    read()  # the memory's pages are there from now on
    return read
