"""How near does a full hit come to the bare disk? Everything is stored and nothing is throttled.

The floor is reading the files' bytes (`preadv`, into existing memory, with as many threads as there are loaders) and running
the prompt's suffix. The rest is ours: naming the chunks, the lookup, fresh memory for the KV (the kernel clears each of its
pages), checksums, threads. The files were written a moment ago, so both sides read them from the page cache.

Before anything loaded is used, a short forward checks that the model computes what it did before (`model.behaviour`). It runs
beside the loads; its remaining cost shows in the comparison with prompts that take a remembered answer instead.

The same prompt load-only shows what it costs to start computing at all: with a store this fast, the best split computes
nothing, and everyone waits for a computed chunk that is done after the last load.
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
from cake_hf.model.kv_layout import Made

NEVER_SLOWER = Goal(1.02)
NEAR_THE_FLOOR = Goal(1.1)
NOTHING_COMPUTED = Goal(0)
ASKING = Goal(1.02)


def measure(bench: Workbench) -> Result:
    """Times full hits and bare reads, interleaved."""
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
    """The result of an arm in one round.

    Attributes:
        seconds: that it took.
        run: the details; None for bare reads.
    """

    seconds: float
    run: Run | None = None

    @classmethod
    def of(cls, run: Run) -> _Round:
        return cls(run.seconds, run)


def _told(answer: tuple[Kept, Made], run: Callable[[], Run]) -> Run:
    """Times a run that takes this as the short forward's answer."""
    with patch("cake_hf.restore.bound_model.behaviour", lambda model: answer):
        return run()


def _reader(threads: ThreadPoolExecutor, paths: Sequence[Path]) -> Callable[[], float]:
    """Returns a function that reads all files into the same memory each time, and returns the seconds."""
    memory = [[memoryview(bytearray(path.stat().st_size))] for path in paths]

    def read() -> float:
        begin = time.perf_counter()
        list(threads.map(read_file, paths, memory))
        return time.perf_counter() - begin

    read()  # the memory's pages exist from now on
    return read
