"""How costs are learnt from prompt to prompt. Pure arithmetic: no clock, no files, no threads.

Costs are those of now. What earlier prompts tell is the *shape*: how much more later chunks cost to compute, how much of a load
is latency. How dear all that is at present is told by the last prompt that measured anything, and a restore corrects it as it
goes (see `pace`). So a prompt under a passing load is forgotten with the next one that measures.
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
"""Of so many prompts measurements are remembered. The oldest go first."""

STEPS = 64
"""Of each prompt, so many chunks."""

FIT_POINTS = 48
"""A line is fitted through at most so many points (it looks at all pairs)."""

OLD_SECONDS = 24 * 3600.0
"""A note of more than that is a guess: computing is tried again at once (see `CostLearner.credit`)."""

FUTURE_SECONDS = 3600.0
"""So much may the clocks of those who write notes differ. A note from later than that is ignored."""

DOUBTFUL = 2.0
"""So is a note whose last measurements differ by more than that from the median of all."""

Steps = Sequence[tuple[int, float]]
"""(index on the absolute grid, seconds) of chunks that were computed."""


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
        return _load_cost(alone - transfer, transfer / self.chunk_bytes, chunk_bytes, self.threads)


class CostLearner:
    """Estimates costs from what is measured as prompts go by. Memory is bounded; one thread at a time.

    What a process measures first is cold (kernels are chosen, connections opened, files not cached): it counts only as long
    as there is nothing else. Outliers within a prompt are met with medians. Measurements that can be none are ignored.

    Attributes:
        credit: seconds of restores in which nothing was tried that is not believed to be worth it (see `pace.Pace`).
        quiet: of the time that the last prompt's chunks took, the part that others on the machine left to them; 1 where it is
            not known.
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
        """A prompt was restored.

        Args:
            pace: of the restore, which has ended.
            timeline: of its report.
            chunk_bytes: of one chunk.
        """
        self.saw_steps(pace.steps)
        # Where each load was overtaken, nothing else would tell that loads take longer than was believed.
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
        """Chunks were computed, by one prompt.

        Args:
            steps: where a forward was left, with the seconds that all of it would have taken.
        """
        good = [(index, seconds) for index, seconds in steps if _is_step(index, seconds)]
        if good and not self._step_seen:
            self._step_seen, self._cold_step = True, good.pop(0)
        if good:
            self._prompts.append(good[-STEPS:])
        self._stale = True

    def saw_part(self, index: int, seconds: float) -> None:
        """A part of a chunk was computed: about the least that a whole one costs, and a guess as long as none was computed.

        Where loads are so fast that no chunk is ever computed, nothing else would tell that none should be begun.

        Args:
            index: of the chunk on the absolute grid.
            seconds: it took.
        """
        if _is_step(index, seconds) and not self._prompts and not self._step_seen:
            self._cold_step, self._stale = (index, seconds), True

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

    def to_json(self, now: float) -> str:
        """All that is remembered, as one line of JSON.

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
        """The learner that `to_json` described; None where the text is damaged, foreign, from the future or absurd.

        The next measurements are again taken as cold, for they come from a new process. Of a note that is old, or whose
        measurements differ much, the costs are only a start: the first restore may try what they speak against.

        Args:
            text: of the note.
            now: seconds since the epoch.
        """
        try:
            return cls._from_plain(json.loads(text), now)
        except (ValueError, TypeError, LookupError, RecursionError):
            return None

    def spread(self) -> float:
        """How far the last prompt's costs are from the median of all: a factor, at least 1."""
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
        """The line of all prompts, at the level of the last one."""
        if not self._prompts:
            return None if self._cold_step is None else _line([self._cold_step])
        line = self._fit_shape()
        return _scaled(line, _levels([self._prompts[-1]], line)[0])

    def _fit_shape(self) -> ComputeCost:
        """A line through the steps of all prompts, after each prompt was brought to one level."""
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


def _line(steps: Steps) -> ComputeCost:
    by_index: defaultdict[int, list[float]] = defaultdict(list)
    for index, seconds in steps:
        by_index[index].append(seconds)
    base, slope = fit_line(_thinned(sorted((float(index), median(seen)) for index, seen in by_index.items())))
    return ComputeCost(min(base, MAX_SECONDS), min(slope, MAX_SECONDS))


def _levels(prompts: Iterable[Steps], line: ComputeCost) -> list[float]:
    """How many times as long as by that line the chunks of each prompt took."""
    return [
        _level([seconds / line.seconds(index) for index, seconds in steps if line.seconds(index) > 0])
        for steps in prompts
    ]


def _level(ratios: Sequence[float]) -> float:
    return min(max(median(ratios), 1 / MAX_SECONDS), MAX_SECONDS) if ratios else 1.0


def _scaled(line: ComputeCost, level: float) -> ComputeCost:
    return ComputeCost(min(line.base * level, MAX_SECONDS), min(line.slope * level, MAX_SECONDS))


def _spread(levels: Sequence[float]) -> float:
    if not levels or not (middle := median(levels)) > 0 or not levels[-1] > 0:
        return 1.0
    return min(max(levels[-1] / middle, middle / levels[-1]), MAX_SECONDS)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most FIT_POINTS points: each the medians of its neighbourhood."""
    if len(points) <= FIT_POINTS:
        return points
    edges = [len(points) * n // FIT_POINTS for n in range(FIT_POINTS + 1)]
    groups = (points[start:end] for start, end in pairwise(edges))
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups]


def _fit_load(batches: Sequence[_Batch], chunk_bytes: int | None) -> LoadCost | None:
    """That of the last batch; where it has too few loads to tell latency from bandwidth, the median one's, at its level."""
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
