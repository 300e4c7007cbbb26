"""Learning of costs from prompt to prompt. Pure arithmetic: no clock, no files, no threads.

Costs describe the present. Earlier prompts determine their *shape*: how much more later chunks cost to compute, and how much of
a load is latency. The present *level* comes from the last prompt that measured anything, and a restore corrects it as it runs
(see `pace`). A prompt that ran under a passing load is therefore forgotten with the next one that measures.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

from cake_hf.report import Span
from cake_hf.scheduling.costs import (
    MAX_BYTES,
    MAX_INDEX,
    MAX_SECONDS,
    ComputeCost,
    Costs,
    LoadCost,
    busy_seconds,
    is_number,
    most_at_once,
)
from cake_hf.scheduling.pace import Pace

FORMAT = "cake_hf costs"
VERSION = 3

PROMPTS = 8
"""Number of prompts whose measurements are remembered. The oldest are dropped first."""

STEPS = 64
"""Number of chunks remembered per prompt."""

FIT_POINTS = 48
"""Maximum number of points that a line is fitted through (the fit looks at all pairs)."""

OLD_SECONDS = 24 * 3600.0
"""A note older than this is a guess: computing is tried again at once (see `CostLearner.credit`)."""

FUTURE_SECONDS = 3600.0
"""Tolerated difference between the clocks of machines that write notes. A note from further in the future is ignored."""

DOUBTFUL = 2.0
"""A note is also a guess if its last measurements differ from the median of all by more than this factor."""

Steps = Sequence[tuple[int, float]]
"""(index on the absolute grid, seconds) of computed chunks."""


@dataclass(frozen=True)
class _Batch:
    """Loads that were measured together.

    Attributes:
        chunk_bytes: bytes of each chunk.
        count: number of loads.
        busy: seconds during which anything was being loaded.
        shortest: seconds of the fastest load.
        threads: number of loads that ran concurrently.
    """

    chunk_bytes: int
    count: int
    busy: float
    shortest: float
    threads: int

    def cost(self, chunk_bytes: int) -> LoadCost:
        """Returns the model that reproduces these numbers: `finish(count) = busy` and, in steady flow, `seconds = shortest`.

        If the path is the bottleneck, n loads take `m + (n - 1) * D` seconds, where m is the time of a single load. Otherwise
        each round of k loads takes m, and the last round `m + p * D`, where p is the number of its loads after the first; p = 0
        says nothing about D except that it is at most m / k. The part of m beyond D is latency.
        """
        alone, transfer = self.shortest, self.shortest
        if self.count > 1:
            transfer = (self.busy - alone) / (self.count - 1)
            if transfer * self.threads < alone:
                rounds, beyond = divmod(self.count - 1, self.threads)
                transfer = (self.busy - (rounds + 1) * alone) / beyond if beyond else alone / self.threads
                transfer = min(max(transfer, 0.0), alone / self.threads)
        return _load_cost(alone - transfer, transfer / self.chunk_bytes, chunk_bytes, self.threads)


class CostLearner:
    """Estimates costs from measurements of successive prompts. Memory is bounded; one thread at a time.

    A process's first measurement is cold (kernels are selected, connections opened, files not cached) and counts only while
    there is no other. Medians suppress outliers within a prompt. Impossible measurements are ignored.

    Attributes:
        credit: seconds of restores during which nothing was tried that is believed not to be worth it (see `pace.Pace`).
        quiet: fraction of the time of the last prompt's chunks that other processes on the machine left to them; 1 if it is not
            known.
    """

    def __init__(self) -> None:
        self.credit, self.quiet = 0.0, 1.0
        self._prompts: deque[list[tuple[int, float]]] = deque(maxlen=PROMPTS)
        self._batches: deque[_Batch] = deque(maxlen=PROMPTS)
        self._cold_step: tuple[int, float] | None = None
        self._cold_batch: _Batch | None = None
        self._step_seen = self._batch_seen = False
        self._compute: ComputeCost | None = None
        self._stale = False

    def saw_restore(self, pace: Pace, timeline: Sequence[Span], chunk_bytes: int) -> None:
        """Records what one restore measured.

        Args:
            pace: of the restore, which has ended.
            timeline: of its report.
            chunk_bytes: bytes of one chunk.
        """
        self.saw_steps(pace.steps)
        # If every load was superseded, nothing else would show that loads take longer than believed.
        if loads := _spans(timeline, "loaded") or _spans(timeline, "superseded"):
            self.saw_loads(chunk_bytes, loads)
        elif self._batches and pace.lateness > 1:
            last = self._batches[-1]
            late = replace(last, busy=last.busy * pace.lateness, shortest=last.shortest * pace.lateness)
            self._batches.extend([late] if _is_batch(late) else [])
        self.credit = pace.credit
        if pace.steps:
            self.quiet = median(pace.shares) if pace.shares else 1.0

    def saw_steps(self, steps: Steps) -> None:
        """Records the chunks that one prompt computed.

        Args:
            steps: the measured chunks; for a forward that ended early, the seconds that the whole forward would have taken.
        """
        good = [(index, seconds) for index, seconds in steps if _is_step(index, seconds)]
        if good and not self._step_seen:
            self._step_seen, self._cold_step = True, good.pop(0)
        if good:
            self._prompts.append(good[-STEPS:])
        self._stale = True

    def saw_part(self, index: int, seconds: float) -> None:
        """Records the time of a part of a chunk: about the minimum for a whole chunk, and the estimate until one is computed.

        If loads are so fast that no chunk is ever computed, nothing else would show that none should be started.

        Args:
            index: index of the chunk on the absolute grid.
            seconds: time that the part took.
        """
        if _is_step(index, seconds) and not self._prompts and not self._step_seen:
            self._cold_step, self._stale = (index, seconds), True

    def saw_loads(self, chunk_bytes: int, spans: Iterable[tuple[float, float]]) -> None:
        """Records loads by any number of threads: ideally all loads of one restore at once, without those that failed.

        Args:
            chunk_bytes: bytes of each chunk.
            spans: start and end of each load, in seconds of one clock. How they overlap separates latency from bandwidth.
        """
        batch = _batch_of(chunk_bytes, list(spans))
        if batch is None:
            return
        if self._batch_seen:
            self._batches.append(batch)
        else:
            self._batch_seen, self._cold_batch = True, batch

    def costs(self, chunk_bytes: int | None = None) -> Costs:
        """Returns the present estimate.

        Args:
            chunk_bytes: size of the chunks that will be loaded; by default the size last seen.
        """
        batches = list(self._batches) or ([self._cold_batch] if self._cold_batch else [])
        return Costs(self._compute_cost(), _fit_load(batches, chunk_bytes))

    def to_json(self, now: float) -> str:
        """Returns all that is remembered, as one line of JSON.

        Args:
            now: seconds since the epoch.
        """
        cold_batch = self._cold_batch
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "written": now,
            "spread": self.spread(),
            "credit": self.credit,
            "quiet": self.quiet,
            "steps": [[list(step) for step in steps] for steps in self._prompts],
            "loads": [_batch_row(batch) for batch in self._batches],
            "cold_step": None if self._cold_step is None else list(self._cold_step),
            "cold_load": None if cold_batch is None else _batch_row(cold_batch),
        }
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str, now: float) -> CostLearner | None:
        """Returns the learner that `to_json` described; None if the text is damaged, foreign, from the future or absurd.

        Its next measurements count as cold again, since they come from a new process. If a note is old or its measurements
        differ much, its costs are only a start: the first restore may try what they advise against.

        Args:
            text: content of the note.
            now: seconds since the epoch.
        """
        try:
            return cls._from_plain(json.loads(text), now)
        except (ValueError, TypeError, LookupError, RecursionError):
            return None

    def spread(self) -> float:
        """Returns how far the last prompt's costs are from the median of all prompts: a factor, at least 1."""
        levels = _levels(self._prompts, self._fit_shape()) if self._prompts else []
        return max(
            _spread(levels),
            _spread([batch.busy / batch.count for batch in self._batches]),
        )

    def _compute_cost(self) -> ComputeCost | None:
        if self._stale:
            self._compute = self._fit_compute()
            self._stale = False
        return self._compute

    def _fit_compute(self) -> ComputeCost | None:
        """Returns the line through all prompts, scaled to the level of the last one."""
        if not self._prompts:
            return None if self._cold_step is None else _line([self._cold_step])
        line = self._fit_shape()
        return _scaled(line, _levels([self._prompts[-1]], line)[0])

    def _fit_shape(self) -> ComputeCost:
        """Returns a line through the steps of all prompts after bringing the prompts to one level."""
        line = _line([step for steps in self._prompts for step in steps])
        levels = _levels(self._prompts, line)
        return _line(
            [
                (index, seconds / level)
                for steps, level in zip(self._prompts, levels, strict=True)
                for index, seconds in steps
            ]
        )

    @classmethod
    def _from_plain(cls, plain: Any, now: float) -> CostLearner:
        if plain["format"] != FORMAT or isinstance(plain["version"], bool) or plain["version"] != VERSION:
            raise ValueError("not ours")
        if not is_number(plain["written"], 0, now + FUTURE_SECONDS) or not is_number(plain["spread"], 1, math.inf):
            raise ValueError("of no time that has been")
        if not is_number(plain["credit"], -MAX_SECONDS, MAX_SECONDS):
            raise ValueError("not a credit")
        if not is_number(plain["quiet"], 1 / MAX_SECONDS, 1.0):
            raise ValueError("not a part of a time")
        learner = cls()
        learner._prompts.extend([_step(row) for row in _rows(steps)] for steps in _rows(plain["steps"]) if _rows(steps))
        learner._batches.extend(_batch(row) for row in _rows(plain["loads"]))
        learner._cold_step = None if plain["cold_step"] is None else _step(plain["cold_step"])
        learner._cold_batch = None if plain["cold_load"] is None else _batch(plain["cold_load"])
        doubtful = now - plain["written"] > OLD_SECONDS or plain["spread"] > DOUBTFUL
        learner.credit = MAX_SECONDS if doubtful else float(plain["credit"])
        learner.quiet = float(plain["quiet"])
        learner._stale = True
        return learner


def _spans(timeline: Sequence[Span], outcome: str) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in timeline if span.outcome == outcome]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns intercept and slope by Theil-Sen: the median slope of all pairs, then the median of `y - slope * x`.

    Up to 29 % of the points may be arbitrary (Sen, J. Am. Stat. Assoc. 63, 1968). Neither number is ever negative: a slope
    below 0 becomes 0, and if the intercept would be below 0, the line goes through the origin.

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


def _line(steps: Steps) -> ComputeCost:
    by_index: defaultdict[int, list[float]] = defaultdict(list)
    for index, seconds in steps:
        by_index[index].append(seconds)
    base, slope = fit_line(_thinned(sorted((float(index), median(seen)) for index, seen in by_index.items())))
    return ComputeCost(min(base, MAX_SECONDS), min(slope, MAX_SECONDS))


def _levels(prompts: Sequence[Steps], line: ComputeCost) -> list[float]:
    """Returns, for each prompt, the ratio of its chunks' measured times to those on the line."""
    expected = {index: line.seconds(index) for index in {index for steps in prompts for index, _ in steps}}
    return [_level([seconds / expected[index] for index, seconds in steps if expected[index] > 0]) for steps in prompts]


def _level(ratios: Sequence[float]) -> float:
    return min(max(median(ratios), 1 / MAX_SECONDS), MAX_SECONDS) if ratios else 1.0


def _scaled(line: ComputeCost, level: float) -> ComputeCost:
    return ComputeCost(min(line.base * level, MAX_SECONDS), min(line.slope * level, MAX_SECONDS))


def _spread(levels: Sequence[float]) -> float:
    if not levels or not (middle := median(levels)) > 0 or not levels[-1] > 0:
        return 1.0
    return min(max(levels[-1] / middle, middle / levels[-1]), MAX_SECONDS)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Returns at most FIT_POINTS points, each the medians of a group of neighbours."""
    if len(points) <= FIT_POINTS:
        return points
    edges = [len(points) * n // FIT_POINTS for n in range(FIT_POINTS + 1)]
    groups = (points[start:end] for start, end in pairwise(edges))
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups]


def _fit_load(batches: Sequence[_Batch], chunk_bytes: int | None) -> LoadCost | None:
    """Returns the cost of the last batch.

    If it has too few loads to separate latency from bandwidth: the cost of the median batch, scaled to the last batch's level.
    """
    if not batches:
        return None
    last = batches[-1]
    size = last.chunk_bytes if chunk_bytes is None else chunk_bytes
    if last.count > last.threads:
        return last.cost(size)
    costs = sorted(((batch, batch.cost(size)) for batch in batches), key=lambda pair: pair[1].interval)
    reached = list(accumulate(batch.count for batch, _ in costs))
    usual, cost = costs[bisect_left(reached, reached[-1] / 2)]
    due = usual.cost(last.chunk_bytes).finish(last.count)
    level = _level([last.busy / due] if due > 0 else [])
    return _load_cost(cost.latency * level, level / cost.bandwidth, size, cost.threads)


def _load_cost(latency: float, per_byte: float, chunk_bytes: int, threads: int) -> LoadCost:
    bandwidth = 1 / per_byte if per_byte * MAX_BYTES > 1 else float(MAX_BYTES)
    return LoadCost(min(max(latency, 0.0), MAX_SECONDS), max(1.0, bandwidth), chunk_bytes, threads)


def _batch_of(chunk_bytes: int, spans: Sequence[tuple[float, float]]) -> _Batch | None:
    good = [(start, end) for start, end in spans if 0 <= end - start <= MAX_SECONDS]
    shortest = min((end - start for start, end in good), default=0.0)
    batch = _Batch(chunk_bytes, len(good), busy_seconds(good), shortest, most_at_once(good))
    return batch if _is_batch(batch) else None


def _is_step(index: object, seconds: object) -> bool:
    return is_number(index, 0, MAX_INDEX) and isinstance(index, int) and is_number(seconds, 0.0, MAX_SECONDS)


def _is_batch(batch: _Batch) -> bool:
    whole = all(isinstance(number, int) for number in (batch.chunk_bytes, batch.count, batch.threads))
    in_range = is_number(batch.chunk_bytes, 1, MAX_BYTES) and is_number(batch.count, 1, MAX_INDEX)
    possible = is_number(batch.threads, 1, batch.count) and is_number(batch.busy, 0.0, MAX_SECONDS)
    return whole and in_range and possible and is_number(batch.shortest, 0.0, batch.busy) and batch.shortest > 0


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
