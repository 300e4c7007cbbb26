"""Why not both? Time to first token when a prefix is computed, loaded, or computed and loaded from both ends.

The store is a local one behind a throttle, at three bandwidths: loading takes about half as long as computing, as long, and
twice as long. In between lies the crossing where two ends help most; outside of it the better single method is hard to beat,
and must not be lost against. A cache learns what computing and loading cost, so in the first round it knows less than in the
others, as with a new store; the median is that of a store in use.

`cells` defines ratio, eta and sigma.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.cells import Costs, Goals, calibrate, cell_figures, ttft
from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import interleave
from benchmarks.workbench import Run, Workbench, median_parts
from cake_hf.testing import ThrottledStore

NEVER_SLOWER = Goal(1.02)
NEAR_THE_LIMIT = Goal(0.91, at_most=False)
"""The paper's own tables come to 0.91-0.97 at 16K tokens."""
PAPERS_SIGMA = Goal(1.04)
"""The paper's own tables come to 0.97-1.04 at 16K tokens."""


GOALS = Goals(NEVER_SLOWER, NEAR_THE_LIMIT, PAPERS_SIGMA)


def measure(bench: Workbench) -> Result:
    """Times all cells, interleaved."""
    chunk_bytes = bench.chunk_bytes()
    bandwidths = calibrate(bench, bench.settings.load_to_compute)
    _check_exactness(bench)
    runs = interleave(_arms(bench, bandwidths), bench.settings.repeats)
    compute_runs = runs["compute"]
    costs = Costs.of(compute_runs, chunk_bytes)
    compute, plain = ttft(compute_runs), ttft(runs["plain"])
    figures = {
        "plain_seconds": Figure.of("plain transformers, by chunks", plain),
        "compute_seconds": Figure.of("compute-only", compute),
        "compute_over_plain": Figure.ratio("compute-only over plain", compute, plain, NEVER_SLOWER),
    }
    cells: list[object] = []
    for wanted, bandwidth in bandwidths.items():
        load_runs, both_runs = runs[f"load {wanted:g}"], runs[f"both {wanted:g}"]
        limit = costs.limit(chunk_bytes / bandwidth)
        cell = cell_figures(compute, ttft(load_runs), ttft(both_runs), limit, GOALS)
        figures |= {f"{name}_at_{wanted:g}": figure.prefixed(f"at {wanted:g}: ") for name, figure in cell.items()}
        details = {"load_to_compute": wanted, "bytes_per_second": bandwidth, **_explain(both_runs, costs)}
        cells.append({**details, **{name: figure.as_dict() for name, figure in cell.items()}})
    return Result(
        "Both ends against each alone (at 2: load-only takes about 2 x compute-only)",
        figures,
        {"chunk_bytes": chunk_bytes, "chunk_seconds": costs.chunk_seconds, "cells": cells},
    )


def _arms(bench: Workbench, bandwidths: dict[float, float]) -> dict[str, Callable[[], Run]]:
    store = bench.filled_store()
    arms: dict[str, Callable[[], Run]] = {
        "plain": bench.plain_run,
        "compute": lambda: bench.cake_run(store, "compute-only", strategy="compute"),
    }
    for wanted, bandwidth in bandwidths.items():
        # One store object per bandwidth, since what is learned about its costs is remembered with it.
        slow = ThrottledStore(store, bandwidth)
        for strategy in ("load", "both"):
            label = f"{strategy} {wanted:g}"
            arms[label] = partial(bench.cake_run, slow, label, strategy=strategy)
    return arms


def _check_exactness(bench: Workbench) -> None:
    """Checks, before anything is timed, that loaded chunks give the same logits. (Each timed run is checked again.)"""
    for strategy in ("load", "both"):
        bench.cake_run(bench.filled_store(), f"{strategy} before timing", strategy=strategy)


def _explain(runs: list[Run], costs: Costs) -> dict[str, object]:
    """Explains where the time of the both-ends runs went (see `Run.parts`), and how much the loading slowed the computing.

    `slowdown`: how much longer the main thread's chunks took than the same chunks in compute-only runs.
    """
    alone = [sum(costs.chunk_seconds[span.chunk] for span in run.spans()) for run in runs]
    slowdown = [run.parts()["computing"] / reference for run, reference in zip(runs, alone, strict=True) if reference]
    return {
        "parts": median_parts(runs),
        "chunks_computed": statistics.median(len(run.spans()) for run in runs),
        "slowdown": statistics.median(slowdown) if slowdown else None,
    }
