"""Why not both? Time to first token when a prefix is computed, loaded, or computed and loaded from both ends.

The store is a local one behind a throttle, at three bandwidths: loading takes about half as long as computing, as long, and
twice as long. In between lies the crossing where two ends help most; outside of it the better single method is hard to
beat, and must not be lost against. A cache learns what computing and loading cost, so in the first round it knows less than
in the others, as with a new store; the median is that of a store in use.

For each bandwidth:

* ratio = T_both / min(T_compute, T_load): above 1 somebody would have been better off without us.
* eta = T* / T_both: how near the run came to the best possible split (see `planner.optimum`; 1 is perfect). f_i is each chunk's
  median time in the compute-only runs of the same rounds, l = a chunk's bytes / bandwidth, S the last piece's time.
* sigma = T_both / T_compute + T_both / T_load: 1 is the bound if all chunks cost the same to compute; below 1 is a gain
  from the front being cheaper than the back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cake_hf.arithmetic.planner import optimum
from cake_hf.people.bench.results import Figure, Goal, Result
from cake_hf.people.bench.timing import Sample, interleave, ratio
from cake_hf.people.bench.workbench import Run, Workbench, median_parts
from cake_hf.stores.wrappers import ThrottledStore

NEVER_SLOWER = Goal(1.02)
NEAR_THE_LIMIT = Goal(0.91, at_most=False)
"""The paper's own tables come to 0.91-0.97 at 16K tokens."""
PAPERS_SIGMA = Goal(1.04)
"""The paper's own tables come to 0.97-1.04 at 16K tokens."""


@dataclass(frozen=True)
class Costs:
    """What the optimum is computed from, measured in the same rounds.

    Attributes:
        chunk_seconds: f_i.
        suffix_seconds: S.
        chunk_bytes: of one chunk at rest.
    """

    chunk_seconds: list[float]
    suffix_seconds: float
    chunk_bytes: int

    def limit(self, bandwidth: float) -> float:
        """T* in seconds, at so many bytes per second."""
        return optimum(self.chunk_seconds, self.chunk_bytes / bandwidth, self.suffix_seconds)


def measure(bench: Workbench) -> Result:
    """Time all cells, interleaved."""
    chunk_bytes = _chunk_bytes(bench)
    bandwidths = _calibrate(bench, chunk_bytes)
    _check_exactness(bench)
    runs = interleave(_arms(bench, bandwidths), bench.settings.repeats)
    compute_runs = runs["compute"]
    costs = Costs(_chunk_seconds(compute_runs), statistics.median(r.tail_seconds for r in compute_runs), chunk_bytes)
    compute, plain = _ttft(compute_runs), _ttft(runs["plain"])
    figures = {
        "plain_seconds": Figure.of("plain transformers, by chunks", plain),
        "compute_seconds": Figure.of("compute-only", compute),
        "compute_over_plain": Figure.ratio("compute-only over plain", compute, plain, NEVER_SLOWER),
    }
    cells: list[object] = []
    for wanted, bandwidth in bandwidths.items():
        load_runs, both_runs = runs[f"load {wanted:g}"], runs[f"both {wanted:g}"]
        cell = _cell(compute, _ttft(load_runs), _ttft(both_runs), costs.limit(bandwidth))
        figures |= {f"{name}_at_{wanted:g}": figure.prefixed(f"at {wanted:g}: ") for name, figure in cell.items()}
        details = {"load_to_compute": wanted, "bytes_per_second": bandwidth, **_explain(both_runs, costs)}
        cells.append({**details, **{name: figure.as_dict() for name, figure in cell.items()}})
    return Result(
        "Both ends against each alone (at 2: load-only takes about 2 x compute-only)",
        figures,
        {"chunk_bytes": chunk_bytes, "chunk_seconds": costs.chunk_seconds, "cells": cells},
    )


def _cell(compute: Sample, load: Sample, both: Sample, limit: float) -> dict[str, Figure]:
    """The figures of one bandwidth."""
    better = min(compute, load, key=lambda sample: sample.median)
    etas, sigmas = Sample(tuple(limit / t for t in both.values)), _sigmas(compute, load, both)
    sigma = both.median / compute.median + both.median / load.median
    return {
        "load_seconds": Figure.of("load-only", load),
        "both_seconds": Figure.of("both", both),
        "limit_seconds": Figure("T*, the limit", limit, limit, limit, "s"),
        "ratio": Figure("both over the better one", *ratio(both, better), "x", NEVER_SLOWER),
        "eta": Figure("eta = T* / T", limit / both.median, *etas.spread, "x", NEAR_THE_LIMIT),
        "sigma": Figure("sigma", sigma, *sigmas.spread, "x", PAPERS_SIGMA),
    }


def _sigmas(compute: Sample, load: Sample, both: Sample) -> Sample:
    rounds = zip(compute.values, load.values, both.values, strict=True)
    return Sample(tuple(t / c + t / ld for c, ld, t in rounds))


def _arms(bench: Workbench, bandwidths: dict[float, float]) -> dict[str, Callable[[], Run]]:
    store = bench.filled_store()
    arms: dict[str, Callable[[], Run]] = {
        "plain": bench.plain_run,
        "compute": lambda: bench.cake_run(store, "compute-only", strategy="compute"),
    }
    for wanted, bandwidth in bandwidths.items():
        # One store object per bandwidth, since what is learnt about its costs is remembered with it.
        slow = ThrottledStore(store, bandwidth)
        for strategy in ("load", "both"):
            label = f"{strategy} {wanted:g}"
            arms[label] = partial(bench.cake_run, slow, label, strategy=strategy)
    return arms


def _calibrate(bench: Workbench, chunk_bytes: int) -> dict[float, float]:
    """For each wanted T_load / T_compute the bandwidth, bytes per second, that gives it about.

    Load-only takes `n * l + S`; the fastest of three compute-only runs says what T_compute and S are here today.
    """
    store = bench.filled_store()
    runs = [bench.cake_run(store, "calibration", strategy="compute") for _ in range(3)]
    fastest = min(runs, key=lambda run: run.seconds)
    payload = bench.settings.chunks * chunk_bytes

    def bandwidth(wanted: float) -> float:
        seconds = wanted * fastest.seconds
        return payload / max(seconds - fastest.tail_seconds, seconds / 10)

    return {wanted: bandwidth(wanted) for wanted in bench.settings.load_to_compute}


def _check_exactness(bench: Workbench) -> None:
    """Before anything is timed: what is loaded gives the same logits. (Each timed run is checked again.)"""
    for strategy in ("load", "both"):
        bench.cake_run(bench.filled_store(), f"{strategy} before timing", strategy=strategy)


def _chunk_bytes(bench: Workbench) -> int:
    store = bench.filled_store()
    return store.size(next(store.keys())) or 0


def _ttft(runs: list[Run]) -> Sample:
    return Sample(tuple(run.seconds for run in runs))


def _chunk_seconds(runs: list[Run]) -> list[float]:
    """f_i: each chunk's median over the runs."""
    per_run = [[span.end - span.start for span in run.spans()] for run in runs]
    return [statistics.median(column) for column in zip(*per_run, strict=True)]


def _explain(runs: list[Run], costs: Costs) -> dict[str, object]:
    """Where the time of the both-ends runs went (see `Run.parts`), and what the loading beside it cost the computing.

    `slowdown`: how much longer the main thread's chunks took than the same chunks in compute-only runs.
    """
    alone = [sum(costs.chunk_seconds[span.chunk] for span in run.spans()) for run in runs]
    slowdown = [run.parts()["computing"] / reference for run, reference in zip(runs, alone, strict=True) if reference]
    return {
        "parts": median_parts(runs),
        "chunks_computed": statistics.median(len(run.spans()) for run in runs),
        "slowdown": statistics.median(slowdown) if slowdown else None,
    }
