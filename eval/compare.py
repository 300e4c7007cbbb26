"""Compares the outcomes of runs: pure arithmetic.

Exact means: every mode with a `CakeCache` has the tokens and, bit for bit, the logits of the chunked run. In float32 all
tokens are also those of the single-shot run. In lower precision one big forward and many small ones may fall to different
sides of a near tie, in every library; such differences are listed with the lead that the best logit had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from eval.outcomes import Outcome, first_difference

SINGLE, CHUNKED = "plain", "chunked"
ORACLES = (SINGLE, CHUNKED)


@dataclass(frozen=True)
class Difference:
    """The place where a mode's tokens differ from the single-shot run's.

    Attributes:
        task, row, mode: which.
        position: of the first different token, counted from 0 at the first new one.
        margin: the lead of the single-shot run's best logit over the second there.
    """

    task: str
    row: str
    mode: str
    position: int
    margin: float


@dataclass
class ModeMetrics:
    """The results of one mode over the rows of one task.

    Attributes:
        rows: those that ran without an error.
        errors: rows that raised.
        tokens_as_single, tokens_as_chunked, logits_as_chunked: shares of the rows, 0 to 1.
        score: the task's, 0 to 1; None if it is missing.
        ttft: seconds, median.
        hit_rate: share of full chunks that the store had; None if there were none, or nothing to load from.
        loaded: share of full chunks that were loaded; of the others that the store had, computing was faster or reading failed.
        failed: chunks whose load failed.
    """

    rows: int = 0
    errors: int = 0
    tokens_as_single: float = 0.0
    tokens_as_chunked: float = 0.0
    logits_as_chunked: float = 0.0
    score: float | None = None
    ttft: float = 0.0
    hit_rate: float | None = None
    loaded: float | None = None
    failed: int = 0


@dataclass
class TaskMetrics:
    """The results of all modes of one task."""

    modes: dict[str, ModeMetrics] = field(default_factory=dict)


@dataclass
class Metrics:
    """The results of a run.

    Attributes:
        tasks: by name.
        broken: a sentence for each violation of exactness; none if it holds.
        differences: from the single-shot run.
        notes: what a mode did differently than intended, by "task/row mode".
        skipped: rows that were not run, and why, by "task/row".
        unscored: why a task has no score.
        cut: rows that lost their middle.
    """

    tasks: dict[str, TaskMetrics] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)
    cut: int = 0

    @property
    def rows(self) -> int:
        """The rows that both oracles ran for."""
        return sum(task.modes[CHUNKED].rows for task in self.tasks.values() if CHUNKED in task.modes)

    @property
    def loaded_anything(self) -> bool:
        """Whether any chunk was ever loaded; if not, equal results prove nothing."""
        return any(mode.loaded for task in self.tasks.values() for mode in task.modes.values())

    @property
    def exact(self) -> bool:
        """Whether exactness holds."""
        return not self.broken

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {"exact": self.exact, "rows": self.rows, **asdict(self)}


Scores = Mapping[tuple[str, str, str], float]


def compare(outcomes: Sequence[Outcome], scores: Scores, *, float32: bool) -> Metrics:
    """Compares every mode with both oracles.

    Args:
        outcomes: of all rows whose oracles ran without an error.
        scores: 0 to 1, by `Outcome.key`.
        float32: whether the model computes in it, so that the single-shot run's tokens are the reference, too.
    """
    metrics, by_key = Metrics(), {outcome.key: outcome for outcome in outcomes}
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        metrics.tasks[task] = TaskMetrics()
        for mode in dict.fromkeys(outcome.mode for outcome in outcomes if outcome.task == task):
            of_mode = [outcome for outcome in outcomes if (outcome.task, outcome.mode) == (task, mode)]
            metrics.tasks[task].modes[mode] = _of_mode(of_mode, by_key, scores)
    for outcome in outcomes:
        single, chunked = (by_key[outcome.task, outcome.row, oracle] for oracle in ORACLES)
        metrics.broken += complaints(outcome, single, chunked, float32=float32)
        if (found := _difference(outcome, single)) is not None:
            metrics.differences.append(found)
        if outcome.note:
            metrics.notes[f"{outcome.task}/{outcome.row} {outcome.mode}"] = outcome.note
    metrics.cut = sum(outcome.cut > 0 for outcome in outcomes if outcome.mode == CHUNKED)
    return metrics


def complaints(outcome: Outcome, single: Outcome, chunked: Outcome, *, float32: bool) -> list[str]:
    """Returns how an outcome violates exactness; nothing if it does not."""
    name = f"{outcome.task}/{outcome.row} {outcome.mode}"
    if outcome.error:
        return [f"{name}: {outcome.error}"]
    if outcome.mode not in ORACLES:
        if (place := first_difference(outcome.tokens, chunked.tokens)) is not None:
            return [f"{name}: another token than the chunked run's at new token {place}"]
        if (place := first_difference(outcome.digests, chunked.digests)) is not None:
            return [f"{name}: other logits than the chunked run's at new token {place}"]
    if float32 and (place := first_difference(outcome.tokens, single.tokens)) is not None:
        lead = f"{margin_at(single, place):.3g}"
        return [f"{name}: another token than the single-shot run's at new token {place} (float32; its lead was {lead})"]
    return []


def margin_at(outcome: Outcome, position: int) -> float:
    """Returns the lead of the best logit at a step; 0 after the end."""
    return outcome.margins[position] if position < len(outcome.margins) else 0.0


def _difference(outcome: Outcome, single: Outcome) -> Difference | None:
    position = None if outcome.error else first_difference(outcome.tokens, single.tokens)
    if position is None:
        return None
    return Difference(*outcome.key, position, margin_at(single, position))


def _of_mode(
    outcomes: Sequence[Outcome], by_key: Mapping[tuple[str, str, str], Outcome], scores: Scores
) -> ModeMetrics:
    good = [outcome for outcome in outcomes if not outcome.error]
    metrics = ModeMetrics(rows=len(good), errors=len(outcomes) - len(good))
    if not good:
        return metrics
    singles, chunked = ([by_key[outcome.task, outcome.row, oracle] for outcome in good] for oracle in ORACLES)
    metrics.tokens_as_single = fmean(one.tokens == other.tokens for one, other in zip(good, singles, strict=True))
    metrics.tokens_as_chunked = fmean(one.tokens == other.tokens for one, other in zip(good, chunked, strict=True))
    metrics.logits_as_chunked = fmean(one.digests == other.digests for one, other in zip(good, chunked, strict=True))
    found = [scores[outcome.key] for outcome in good if outcome.key in scores]
    metrics.score = fmean(found) if found else None
    metrics.ttft = median(outcome.ttft for outcome in good)
    chunks = sum(outcome.loaded + outcome.computed for outcome in good)
    if chunks:
        metrics.hit_rate = 1 - sum(outcome.missed for outcome in good) / chunks
        metrics.loaded = sum(outcome.loaded for outcome in good) / chunks
    metrics.failed = sum(outcome.failed for outcome in good)
    return metrics
