"""From a run's outcomes to its metrics: the rows that count, their scores, and the predictions on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.compare import ORACLES, Metrics, compare
from eval.config import RunConfig
from eval.outcomes import Outcome
from eval.runs import RunFolder
from eval.scores import BrokenAnswer, MissingSegmenter, score
from eval.tasks import find_task
from eval.work import Work


def judge(config: RunConfig, folder: RunFolder, work: Work, *, float32: bool) -> Metrics:
    """Compares and scores all outcomes, and writes the predictions of each mode."""
    skipped, outcomes = dict(work.skipped), []
    for prompt in work.prompts:
        found = [folder.outcomes.get((prompt.task, prompt.row, mode)) for mode in config.modes]
        of_row = [outcome for outcome in found if outcome is not None]
        failed = [outcome for outcome in of_row if outcome.mode in ORACLES and outcome.error]
        if failed:
            skipped[f"{prompt.task}/{prompt.row}"] = f"transformers alone cannot run it: {failed[0].error}"
        else:
            outcomes += of_row
    scores, unscored = score_outcomes(outcomes, work)
    metrics = compare(outcomes, scores, float32=float32)
    metrics.skipped, metrics.unscored = skipped, unscored
    for mode in config.modes:
        folder.write_predictions(mode, [_prediction(outcome, work) for outcome in outcomes if outcome.mode == mode])
    return metrics


def score_outcomes(outcomes: Sequence[Outcome], work: Work) -> tuple[dict[tuple[str, str, str], float], dict[str, str]]:
    """Returns (the benchmark's score of each outcome, why some tasks have none)."""
    scores: dict[tuple[str, str, str], float] = {}
    unscored: dict[str, str] = {}
    for outcome in outcomes:
        row = work.rows[outcome.task, outcome.row]
        try:
            if not outcome.error:
                scores[outcome.key] = score(find_task(outcome.task), outcome.text, row.answers, row.classes)
        except (BrokenAnswer, MissingSegmenter) as error:
            unscored[outcome.task] = str(error)
    return scores, unscored


def _prediction(outcome: Outcome, work: Work) -> dict[str, Any]:
    row = work.rows[outcome.task, outcome.row]
    return {
        "dataset": outcome.task,
        "_id": outcome.row,
        "pred": outcome.text,
        "answers": list(row.answers),
        "all_classes": None if row.classes is None else list(row.classes),
    }
