"""Learning of costs from prompt to prompt. Pure arithmetic: no clock, no files, no threads.

Costs describe the present. Earlier prompts determine their *shape*: how much more later chunks cost to compute, and how much of
a load is latency. The present *level* comes from the last prompt that measured anything, and a restore corrects it as it runs
(see `pace`). A prompt that ran under a passing load is therefore forgotten with the next one that measures.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from cake_hf.report import Span
from cake_hf.scheduling.costs import MAX_INDEX, MAX_SECONDS, Brought, CodecCost, ComputeCost, Costs, is_number
from cake_hf.scheduling.load_batches import (
    LoadBatch,
    batch_from,
    batch_of,
    batch_row,
    codec_of,
    fit_load,
    possible_loads,
)
from cake_hf.scheduling.pace import Pace

FORMAT = "cake_hf costs"
VERSION = 4
READABLE = (3, VERSION)
"""Versions of notes. Version 3 did not know of codecs."""

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

COLD_DEBT = 5.0
"""Seconds of restores that a process has to its debit at first. Its first trial is cold: it takes far longer than is believed,
about 0.1 s, and its measurement does not count."""

DOUBTFUL = 2.0
"""A note is also a guess if its last measurements differ from the median of all by more than this factor."""

Steps = Sequence[tuple[int, float]]
"""(index on the absolute grid, seconds) of computed chunks."""

Line = tuple[float, float]
"""Intercept and slope of a line through steps: `base` and `slope` of a `ComputeCost`."""


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
        self._batches: deque[LoadBatch] = deque(maxlen=PROMPTS)
        self._codecs: deque[CodecCost] = deque(maxlen=PROMPTS)
        self._cold_step: tuple[int, float] | None = None
        self._cold_batch: LoadBatch | None = None
        self._step_seen = self._batch_seen = False
        self._compute: ComputeCost | None = None
        self._stale = False
        self._estimates: dict[int | None, Costs] = {}  # the last one, unless something was measured since

    def saw_restore(
        self, pace: Pace, timeline: Sequence[Span], chunk_bytes: int, brought: Mapping[int, Brought] | None = None
    ) -> None:
        """Records what one restore measured.

        Args:
            pace: the pace of the restore, which has ended.
            timeline: the timeline of its report.
            chunk_bytes: bytes of one raw chunk.
            brought: for each chunk that was read, what its load brought; without an entry, it was a raw one.
        """
        self.saw_steps(pace.steps)
        # If every load was superseded, nothing else would show that loads take longer than believed.
        if loads := _of(timeline, "loaded") or _of(timeline, "superseded"):
            told, raw = brought or {}, Brought(chunk_bytes, chunk_bytes)
            spans = [(span.start, span.end) for span in loads]
            self.saw_loads(chunk_bytes, spans, [told.get(span.chunk, raw) for span in loads])
        elif self._batches and pace.lateness > 1:
            late = self._batches[-1].late_by(pace.lateness)
            self._batches.extend([late] if late.is_valid else [])
            self._estimates.clear()
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
        self._estimates.clear()

    def saw_part(self, index: int, seconds: float) -> None:
        """Records the time of a part of a chunk: about the minimum for a whole chunk, and the estimate until one is computed.

        If loads are so fast that no chunk is ever computed, nothing else would show that none should be started.
        """
        if _is_step(index, seconds) and not self._prompts and not self._step_seen:
            self._cold_step, self._stale = (index, seconds), True
            self._estimates.clear()

    def saw_loads(
        self, chunk_bytes: int, spans: Iterable[tuple[float, float]], brought: Sequence[Brought] | None = None
    ) -> None:
        """Records loads by any number of threads: ideally all loads of one restore at once, without those that failed.

        Args:
            chunk_bytes: bytes of each raw chunk.
            spans: start and end of each load, in seconds of one clock. How they overlap separates latency from bandwidth.
            brought: what each of them brought; by default raw chunks.
        """
        pairs = list(spans)
        loads = possible_loads(pairs, [Brought(chunk_bytes, chunk_bytes)] * len(pairs) if brought is None else brought)
        batch, codec = batch_of(loads), codec_of(loads)
        if batch is None:
            return
        self._estimates.clear()
        self._codecs.extend([codec] if codec else [])
        if self._batch_seen:
            self._batches.append(batch)
        else:
            self._batch_seen, self._cold_batch = True, batch

    def costs(self, chunk_bytes: int | None = None) -> Costs:
        """Returns the present estimate.

        Args:
            chunk_bytes: size of the raw chunks that will be loaded; by default chunks are as last seen, encoded ones included.
        """
        if chunk_bytes not in self._estimates:
            batches = list(self._batches) or ([self._cold_batch] if self._cold_batch else [])
            estimate = Costs(self._compute_cost(), fit_load(batches, chunk_bytes), self._codec())
            self._estimates = {chunk_bytes: estimate}
        return self._estimates[chunk_bytes]

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
            "loads": [batch_row(batch) for batch in self._batches],
            "codecs": [[codec.ratio, codec.speed] for codec in self._codecs],
            "cold_step": None if self._cold_step is None else list(self._cold_step),
            "cold_load": None if cold_batch is None else batch_row(cold_batch),
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
        size = self._batches[-1].chunk_bytes if self._batches else 1
        return max(_spread(levels), _spread([batch.cost(size).interval for batch in self._batches]))

    def _codec(self) -> CodecCost | None:
        """Returns the medians of the last prompts."""
        if not self._codecs:
            return None
        return CodecCost(median(one.ratio for one in self._codecs), median(one.speed for one in self._codecs))

    def _compute_cost(self) -> ComputeCost | None:
        if self._stale:
            self._compute = self._fit_compute()
            self._stale = False
        return self._compute

    def _fit_compute(self) -> ComputeCost | None:
        """Returns the line through all prompts, scaled to the level of the last one."""
        if not self._prompts:
            return None if self._cold_step is None else ComputeCost(*_line([self._cold_step]))
        base, slope = line = self._fit_shape()
        level = _levels([self._prompts[-1]], line)[0]
        return ComputeCost(min(base * level, MAX_SECONDS), min(slope * level, MAX_SECONDS))

    def _fit_shape(self) -> Line:
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
        if plain["format"] != FORMAT or isinstance(plain["version"], bool) or plain["version"] not in READABLE:
            raise ValueError("not ours")
        if not is_number(plain["written"], 0, now + FUTURE_SECONDS) or not is_number(plain["spread"], 1, math.inf):
            raise ValueError("of no time that has been")
        if not is_number(plain["credit"], -MAX_SECONDS, MAX_SECONDS):
            raise ValueError("not a credit")
        if not is_number(plain["quiet"], 1 / MAX_SECONDS, 1.0):
            raise ValueError("not a part of a time")
        learner = cls()
        learner._prompts.extend([_step(row) for row in _rows(steps)] for steps in _rows(plain["steps"]) if _rows(steps))
        learner._batches.extend(batch_from(_rows(row)) for row in _rows(plain["loads"]))
        if plain["version"] == VERSION:
            learner._codecs.extend(_codec_from(row) for row in _rows(plain["codecs"]))
        learner._cold_step = None if plain["cold_step"] is None else _step(plain["cold_step"])
        learner._cold_batch = None if plain["cold_load"] is None else batch_from(_rows(plain["cold_load"]))
        doubtful = now - plain["written"] > OLD_SECONDS or plain["spread"] > DOUBTFUL
        learner.credit = MAX_SECONDS if doubtful else min(float(plain["credit"]), -COLD_DEBT)
        learner.quiet = float(plain["quiet"])
        learner._stale = True
        return learner


def _of(timeline: Sequence[Span], outcome: str) -> list[Span]:
    return [span for span in timeline if span.outcome == outcome]


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


def _line(steps: Steps) -> Line:
    by_index: defaultdict[int, list[float]] = defaultdict(list)
    for index, seconds in steps:
        by_index[index].append(seconds)
    base, slope = fit_line(_thinned(sorted((float(index), median(seen)) for index, seen in by_index.items())))
    return min(base, MAX_SECONDS), min(slope, MAX_SECONDS)


def _levels(prompts: Sequence[Steps], line: Line) -> list[float]:
    """Returns, for each prompt, the ratio of its chunks' measured times to those on the line."""
    base, slope = line
    expected = [[(seconds, base + slope * index) for index, seconds in steps] for steps in prompts]
    return [_level([seconds / on_line for seconds, on_line in steps if on_line > 0]) for steps in expected]


def _level(ratios: Sequence[float]) -> float:
    return min(max(median(ratios), 1 / MAX_SECONDS), MAX_SECONDS) if ratios else 1.0


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


def _is_step(index: int, seconds: float) -> bool:
    return 0 <= index <= MAX_INDEX and 0.0 <= seconds <= MAX_SECONDS


def _rows(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _step(row: Any) -> tuple[int, float]:
    index, seconds = _rows(row)
    if type(index) is not int or type(seconds) not in (int, float) or not _is_step(index, seconds):
        raise ValueError("not a step")
    return index, float(seconds)


def _codec_from(row: Any) -> CodecCost:
    ratio, speed = _rows(row)
    return CodecCost(ratio, speed)
