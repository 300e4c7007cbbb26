"""One cell of a comparison: both ends against each alone, and against the best possible split.

* ratio = T_both / min(T_compute, T_load): above 1, a single method would have been faster.
* eta = T* / T_both: how near the run came to the best possible split (see `optimum`; 1 is perfect). f_i is each
  chunk's median time in the compute-only runs of the same rounds, l a chunk's time to load, S the suffix's time.
* sigma = T_both / T_compute + T_both / T_load: 1 is the bound if all chunks cost the same to compute; below 1 is a gain from
  the front being cheaper than the back.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.figures import Figure, Goal
from benchmarks.timing import Sample, ratio
from benchmarks.workbench import Run, Workbench
from cake_hf.scheduling.load_batches import busy_seconds


def optimum(compute_seconds: Sequence[float], load_seconds: float, suffix_seconds: float = 0.0) -> float:
    """Returns T*: the least time to first token when chunks are computed from the front and loaded from the back concurrently.

    If the first m of n chunks are computed and the others loaded, both sides are done after
    `max(f_0 + ... + f_(m-1), (n - m) * l)` seconds; the best m is the limit of any token-wise split (Jin et al., ICML 2025).
    The suffix follows.

    Args:
        compute_seconds: f_i, seconds to compute chunk i.
        load_seconds: l, seconds to load one chunk (bytes over bandwidth).
        suffix_seconds: S, seconds to run the prompt's suffix once its prefix is in the cache.
    """
    chunks, fronts = len(compute_seconds), accumulate(compute_seconds, initial=0.0)
    return min(max(front, (chunks - m) * load_seconds) for m, front in enumerate(fronts)) + suffix_seconds


@dataclass(frozen=True)
class Costs:
    """The costs that the optimum is computed from, measured in the same rounds.

    Attributes:
        chunk_seconds: f_i.
        suffix_seconds: S.
        chunk_bytes: of one chunk at rest.
    """

    chunk_seconds: list[float]
    suffix_seconds: float
    chunk_bytes: int

    @classmethod
    def of(cls, compute_runs: Sequence[Run], chunk_bytes: int) -> Costs:
        """Takes the medians over compute-only runs."""
        suffix = statistics.median(run.tail_seconds for run in compute_runs)
        return cls(_chunk_seconds(compute_runs), suffix, chunk_bytes)

    def limit(self, load_seconds: float) -> float:
        """Returns T* in seconds, if each chunk takes this long to load."""
        return optimum(self.chunk_seconds, load_seconds, self.suffix_seconds)

    def alone(self, load_seconds: float) -> float:
        """Returns the time of the better single method if nothing else took time, in seconds."""
        compute, load = sum(self.chunk_seconds), load_seconds * len(self.chunk_seconds)
        return min(compute, load) + self.suffix_seconds


@dataclass(frozen=True)
class Goals:
    """The goals of a cell; None for figures that are only shown."""

    ratio: Goal | None = None
    eta: Goal | None = None
    sigma: Goal | None = None


def cell_figures(compute: Sample, load: Sample, both: Sample, limit: float, goals: Goals) -> dict[str, Figure]:
    """Returns the figures of one cell.

    Args:
        compute, load, both: seconds to the first token, round by round.
        limit: T*.
        goals: to be met.
    """
    better = min(compute, load, key=lambda sample: sample.median)
    etas, sigmas = Sample(tuple(limit / t for t in both.values)), _sigmas(compute, load, both)
    return {
        "load_seconds": Figure.of("load-only", load),
        "both_seconds": Figure.of("both", both),
        "limit_seconds": Figure("T*, the limit", limit, limit, limit, "s"),
        "ratio": Figure("both over the better one", *ratio(both, better), "x", goals.ratio),
        "eta": Figure("eta = T* / T", limit / both.median, *etas.spread, "x", goals.eta),
        "sigma": Figure("sigma", sigmas.median, *sigmas.spread, "x", goals.sigma),
    }


def ttft(runs: Sequence[Run]) -> Sample:
    """Returns the seconds to the first token of each run."""
    return Sample(tuple(run.seconds for run in runs))


def calibrate(bench: Workbench, load_to_compute: Iterable[float]) -> dict[float, float]:
    """Returns, for each wanted T_load / T_compute, the bandwidth in bytes per second that gives it approximately.

    Load-only takes `n * l + S`; the fastest of three compute-only runs shows the present T_compute and S.
    """
    store = bench.filled_store()
    runs = [bench.cake_run(store, "calibration", strategy="compute") for _ in range(3)]
    fastest = min(runs, key=lambda run: run.seconds)
    payload = bench.settings.chunks * bench.chunk_bytes()

    def bandwidth(wanted: float) -> float:
        seconds = wanted * fastest.seconds
        return payload / max(seconds - fastest.tail_seconds, seconds / 10)

    return {wanted: bandwidth(wanted) for wanted in load_to_compute}


def seconds_per_load(load_runs: Sequence[Run]) -> float:
    """Returns l from load-only runs: the median of the time in which anything was being loaded, per chunk."""
    return statistics.median(_seconds_per_load(run) for run in load_runs)


def _seconds_per_load(run: Run) -> float:
    spans = [(span.start, span.end) for span in run.report.timeline if span.outcome == "loaded"]
    return busy_seconds(spans) / len(spans)


def _sigmas(compute: Sample, load: Sample, both: Sample) -> Sample:
    rounds = zip(compute.values, load.values, both.values, strict=True)
    return Sample(tuple(t / c + t / ld for c, ld, t in rounds))


def _chunk_seconds(runs: Sequence[Run]) -> list[float]:
    """Returns f_i: each chunk's median over the runs."""
    per_run = [[span.end - span.start for span in run.spans()] for run in runs]
    return [statistics.median(column) for column in zip(*per_run, strict=True)]
