"""What computing and loading a chunk cost, and how that is learnt from what was measured.

The model is Cake's (Jin et al., ICML 2025): chunk i costs `a + b * i` seconds to compute, since later chunks attend to more,
and loading costs the same for every chunk. Pure arithmetic: no clock, no files, no threads.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

FORMAT = "cake_hf costs"
VERSION = 2

MAX_SECONDS = 1e6
MAX_BYTES = 2**50
MAX_INDEX = 2**40
"""Beyond these a number is no measurement. They also keep every prediction finite."""

COMPUTE_WINDOW = 128
LOAD_WINDOW = 32
"""How many measurements are remembered: steps, and batches of loads. The oldest go first, so a change is followed."""

FIT_POINTS = 48
"""A line is fitted through at most so many points (it looks at all pairs)."""


@dataclass(frozen=True)
class ComputeCost:
    """Seconds to compute chunk i: `base + slope * i`.

    Attributes:
        base: a, seconds for the first chunk of a prompt.
        slope: b, seconds that each further chunk costs more than the one before it.

    Raises:
        ValueError: a number is negative, not a number or absurdly large.
    """

    base: float
    slope: float = 0.0

    def __post_init__(self) -> None:
        _check("compute base", self.base, 0.0, MAX_SECONDS, "seconds")
        _check("compute slope", self.slope, 0.0, MAX_SECONDS, "seconds")

    def seconds(self, index: int) -> float:
        """Of chunk `index` on the absolute grid."""
        return self.base + self.slope * index


@dataclass(frozen=True)
class LoadCost:
    """Seconds to load chunks of one size: `latency + chunk_bytes / bandwidth` for one alone.

    With k threads each waits `latency` on its own, then takes its turn at the one path of `bandwidth`. In a steady flow a
    chunk then arrives every `max(D, (latency + D) / k)` seconds, with `D = chunk_bytes / bandwidth`: the asymptotic bound
    of a closed queueing network (Denning and Buzen, ACM Computing Surveys 10(3), 1978), reached as nothing is random here.

    Attributes:
        latency: seconds of a load in which the path is free for others.
        bandwidth: bytes per second of the path, shared by all loads.
        chunk_bytes: of one chunk.
        threads: k, loads at a time.

    Raises:
        ValueError: a number is out of range, not a number or absurdly large.
    """

    latency: float
    bandwidth: float
    chunk_bytes: float
    threads: int = 1

    def __post_init__(self) -> None:
        _check("load latency", self.latency, 0.0, MAX_SECONDS, "seconds")
        _check("bandwidth", self.bandwidth, 1.0, MAX_BYTES, "bytes per second")
        _check("size of a chunk", self.chunk_bytes, 1.0, MAX_BYTES, "bytes")
        _check("number of loader threads", self.threads, 1, 2**20, "threads")

    @property
    def seconds(self) -> float:
        """Of one load that has the path to itself."""
        return self.latency + self._transfer

    @property
    def interval(self) -> float:
        """Seconds between two arrivals while all threads are busy."""
        return max(self._transfer, self.seconds / self.threads)

    def finish(self, count: int) -> float:
        """Seconds until `count` chunks are there, all threads starting at 0.

        Each thread's loads take `max(k * D, latency + D)` seconds one after the other; the p-th thread's first is there at
        `latency + p * D`.
        """
        if count <= 0:
            return 0.0
        rounds, position = divmod(count - 1, self.threads)
        return rounds * self.threads * self.interval + self.latency + (position + 1) * self._transfer

    @property
    def _transfer(self) -> float:
        return self.chunk_bytes / self.bandwidth


@dataclass(frozen=True)
class Costs:
    """Both halves of the cost model; None for what is not known (yet)."""

    compute: ComputeCost | None = None
    load: LoadCost | None = None


@dataclass(frozen=True)
class _Batch:
    """Loads that were measured together.

    Attributes:
        chunk_bytes: of each.
        count: of the loads.
        busy: seconds in which anything was being loaded.
        shortest: seconds of the quickest load.
        threads: that loaded at the same time.
    """

    chunk_bytes: int
    count: int
    busy: float
    shortest: float
    threads: int

    def cost(self, chunk_bytes: int) -> LoadCost:
        """The model that gives these numbers: `finish(count) = busy` and, in a steady flow, `seconds = shortest`.

        If the path is the limit, n loads take `m + (n - 1) * D` seconds, with m the time of one alone. Otherwise each round of
        k loads takes m, and the last one `m + p * D` with p the loads beyond the first in it; p = 0 says nothing of D but that
        it is at most m / k. What m has beyond D is latency.
        """
        alone, transfer = self.shortest, self.shortest
        if self.count > 1:
            transfer = (self.busy - alone) / (self.count - 1)
            if transfer * self.threads < alone:
                rounds, beyond = divmod(self.count - 1, self.threads)
                transfer = (self.busy - (rounds + 1) * alone) / beyond if beyond else alone / self.threads
                transfer = min(max(transfer, 0.0), alone / self.threads)
        per_byte = transfer / self.chunk_bytes
        bandwidth = 1 / per_byte if per_byte * MAX_BYTES > 1 else float(MAX_BYTES)
        latency = min(max(alone - transfer, 0.0), MAX_SECONDS)
        return LoadCost(latency, max(1.0, bandwidth), chunk_bytes, self.threads)


class CostLearner:
    """Estimates costs from what is measured as prompts go by. Memory is bounded; one thread at a time.

    What a process measures first is cold (kernels are chosen, connections opened, files not cached): it counts only as long
    as there is nothing else. Outliers are met with medians: see `fit_line` for computing; for loading, the median batch by the
    time from load to load, each batch weighing as much as it has loads. Measurements that can be none are ignored.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=COMPUTE_WINDOW)
        self._batches: deque[_Batch] = deque(maxlen=LOAD_WINDOW)
        self._cold_step: tuple[int, float] | None = None
        self._cold_batch: _Batch | None = None
        self._step_seen = self._left_seen = self._batch_seen = False
        self._compute: ComputeCost | None = None
        self._stale = False

    def saw_compute(self, index: int, seconds: float) -> None:
        """A chunk was computed.

        Args:
            index: of the chunk on the absolute grid.
            seconds: it took.
        """
        if not _is_step(index, seconds):
            return
        if self._step_seen:
            self._steps.append((index, seconds))
        else:
            self._step_seen, self._cold_step = True, (index, seconds)
        self._stale = True

    def saw_part(self, index: int, seconds: float) -> None:
        """A part of a chunk was computed: about the least that a whole one costs, and a guess as long as none was computed.

        Where loads are so fast that no chunk is ever computed, nothing else would tell that none should be begun.

        Args:
            index: of the chunk on the absolute grid.
            seconds: it took.
        """
        if _is_step(index, seconds) and not self._steps and not self._step_seen:
            self._cold_step, self._stale = (index, seconds), True

    def saw_left(self, index: int, seconds: float) -> None:
        """A chunk was begun, and left after that long for having come from the store: all of it would have taken longer.

        Counts where that is more than was believed. Otherwise a chunk that is left each time would be begun each time.

        Args:
            index: of the chunk on the absolute grid.
            seconds: until it was left.
        """
        if not _is_step(index, seconds):
            return
        if not (self._step_seen or self._left_seen):
            self._left_seen = True  # it was cold
            return
        believed = self._compute_cost()
        if believed is None or believed.seconds(index) < seconds:
            self._steps.append((index, seconds))
            self._stale = True

    def saw_loads(self, chunk_bytes: int, spans: Iterable[tuple[float, float]]) -> None:
        """Chunks were loaded, by any number of threads: best all of one restore at once, those that failed left out.

        Args:
            chunk_bytes: of each.
            spans: start and end of each, in seconds of one clock. How they overlap tells latency from bandwidth.
        """
        batch = _batch_of(chunk_bytes, list(spans))
        if batch is None:
            return
        if self._batch_seen:
            self._batches.append(batch)
        else:
            self._batch_seen, self._cold_batch = True, batch

    def costs(self, chunk_bytes: int | None = None) -> Costs:
        """The present estimate.

        Args:
            chunk_bytes: of the chunks that will be loaded; by default as last seen.
        """
        batches = list(self._batches) or ([self._cold_batch] if self._cold_batch else [])
        return Costs(self._compute_cost(), _fit_load(batches, chunk_bytes))

    def to_json(self) -> str:
        """All that is remembered, as one line of JSON."""
        cold_batch = self._cold_batch
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "steps": [list(step) for step in self._steps],
            "loads": [_batch_row(batch) for batch in self._batches],
            "cold_step": None if self._cold_step is None else list(self._cold_step),
            "cold_load": None if cold_batch is None else _batch_row(cold_batch),
        }
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> CostLearner | None:
        """The learner that `to_json` described; None where the text is damaged, foreign, of another version or absurd.

        The next measurements are again taken as cold, for they come from a new process.
        """
        try:
            return cls._from_plain(json.loads(text))
        except (ValueError, TypeError, LookupError, RecursionError):
            return None

    def _compute_cost(self) -> ComputeCost | None:
        if self._stale:
            self._compute = _fit_compute(list(self._steps) or ([self._cold_step] if self._cold_step else []))
            self._stale = False
        return self._compute

    @classmethod
    def _from_plain(cls, plain: Any) -> CostLearner:
        if plain["format"] != FORMAT or isinstance(plain["version"], bool) or plain["version"] != VERSION:
            raise ValueError("not ours")
        learner = cls()
        learner._steps.extend(_step(row) for row in _rows(plain["steps"]))
        learner._batches.extend(_batch(row) for row in _rows(plain["loads"]))
        learner._cold_step = None if plain["cold_step"] is None else _step(plain["cold_step"])
        learner._cold_batch = None if plain["cold_load"] is None else _batch(plain["cold_load"])
        learner._stale = True
        return learner


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one span (start, end) was under way: the length of their union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """How many of the spans (start, end) overlap at most; one that begins where another ends does not overlap it."""
    under_way = most = 0
    for _, change in sorted(
        [(at, change) for start, end in spans if end > start for at, change in ((start, 1), (end, -1))]
    ):
        under_way += change
        most = max(most, under_way)
    return most


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope by Theil-Sen: the median slope of all pairs, then the median of `y - slope * x`.

    Up to 29 % of the points may be anything (Sen, J. Am. Stat. Assoc. 63, 1968). Neither number is ever negative: a slope below
    0 becomes 0; where the intercept would be below 0 the line goes through the origin.

    Args:
        points: x and y, both at least 0; at least one point.
    """
    pairs = ((p, q) for n, p in enumerate(points) for q in points[:n] if p[0] != q[0])
    slopes = [(p[1] - q[1]) / (p[0] - q[0]) for p, q in pairs]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    intercept = median(y - slope * x for x, y in points)
    if intercept >= 0:
        return intercept, slope
    return 0.0, median(y / x for x, y in points if x > 0)


def _fit_compute(steps: Sequence[tuple[int, float]]) -> ComputeCost | None:
    if not steps:
        return None
    by_index: defaultdict[int, list[float]] = defaultdict(list)
    for index, seconds in steps:
        by_index[index].append(seconds)
    base, slope = fit_line(_thinned(sorted((float(index), median(seen)) for index, seen in by_index.items())))
    return ComputeCost(min(base, MAX_SECONDS), min(slope, MAX_SECONDS))


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most FIT_POINTS points: each the medians of its neighbourhood."""
    if len(points) <= FIT_POINTS:
        return points
    edges = [len(points) * n // FIT_POINTS for n in range(FIT_POINTS + 1)]
    groups = (points[start:end] for start, end in pairwise(edges))
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups]


def _fit_load(batches: Sequence[_Batch], chunk_bytes: int | None) -> LoadCost | None:
    """The cost of the median batch, as a whole: its latency and its bandwidth belong together."""
    if not batches:
        return None
    size = batches[-1].chunk_bytes if chunk_bytes is None else chunk_bytes
    costs = sorted(((batch.cost(size), batch.count) for batch in batches), key=lambda pair: pair[0].interval)
    reached = list(accumulate(count for _, count in costs))
    return costs[bisect_left(reached, reached[-1] / 2)][0]


def _batch_of(chunk_bytes: int, spans: Sequence[tuple[float, float]]) -> _Batch | None:
    good = [(start, end) for start, end in spans if 0 <= end - start <= MAX_SECONDS]
    shortest = min((end - start for start, end in good), default=0.0)
    batch = _Batch(chunk_bytes, len(good), busy_seconds(good), shortest, most_at_once(good))
    return batch if _is_batch(batch) else None


def _is_step(index: object, seconds: object) -> bool:
    return _is_number(index, 0, MAX_INDEX) and isinstance(index, int) and _is_number(seconds, 0.0, MAX_SECONDS)


def _is_batch(batch: _Batch) -> bool:
    whole = all(isinstance(number, int) for number in (batch.chunk_bytes, batch.count, batch.threads))
    in_range = _is_number(batch.chunk_bytes, 1, MAX_BYTES) and _is_number(batch.count, 1, MAX_INDEX)
    possible = _is_number(batch.threads, 1, batch.count) and _is_number(batch.busy, 0.0, MAX_SECONDS)
    return whole and in_range and possible and _is_number(batch.shortest, 0.0, batch.busy) and batch.shortest > 0


def _is_number(value: object, low: float, high: float) -> bool:
    """NaN is in no range, and a bool is not a number. (Integers of any length can be compared.)"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _check(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not _is_number(value, low, high):
        raise ValueError(f"The {name} must be between {low:g} and {high:g} {unit}, got {value}.")


def _rows(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _step(row: Any) -> tuple[int, float]:
    index, seconds = _rows(row)
    if not _is_step(index, seconds):
        raise ValueError("not a step")
    return index, float(seconds)


def _batch(row: Any) -> _Batch:
    batch = _Batch(*_rows(row))
    if not _is_batch(batch):
        raise ValueError("not a batch of loads")
    return batch


def _batch_row(batch: _Batch) -> list[float]:
    return [batch.chunk_bytes, batch.count, batch.busy, batch.shortest, batch.threads]
