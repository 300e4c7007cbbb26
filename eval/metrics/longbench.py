"""LongBench's scores as a local metric of the `evaluate` library; it needs no network.

    metric = evaluate.load("eval/metrics/longbench.py", "qasper")
    metric.compute(predictions=["..."], references=[["...", "..."]])

The second argument is a task, which brings its first-line rule along, or the bare name of a score (`eval.scores.METRICS`).
Classification needs `all_classes`, a list of classes for each row. `evaluate` copies this file elsewhere before it imports it;
so run from the repository's root, or have the root on PYTHONPATH, for `eval` to be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from eval.scores import METRICS, score
from eval.tasks import TASKS, Task, UnknownTask

_INPUTS = """
Args:
    predictions: generated texts.
    references: for each prediction, all answers that count as right.
    all_classes: for each prediction, the classes of its task (classification only).
Returns:
    score: the mean, 0 to 1.
    scores: of each prediction, the best over its answers.
"""


class LongBench(evaluate.Metric):  # type: ignore[misc]  # evaluate is not typed for us
    """One task's score; the configuration's name says which."""

    def _info(self) -> Any:
        _meant(self.config_name)
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Bai et al., LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding, ACL 2024",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        all_classes: Sequence[Sequence[str] | None] | None = None,
    ) -> dict[str, Any]:
        task, classes = _meant(self.config_name), all_classes or [None] * len(predictions)
        rows = zip(predictions, references, classes, strict=True)
        scores = [score(task, prediction, answers, names) for prediction, answers, names in rows]
        return {"score": sum(scores) / len(scores) if scores else 0.0, "scores": scores}


def _meant(name: str) -> Task:
    """The task of that name, or a nameless one with that score."""
    if name in TASKS:
        return TASKS[name]
    if name in METRICS:
        return Task(name, "", name, 0)
    raise UnknownTask(
        f"Name a task or a score, as in evaluate.load(path, 'qasper'); tasks are {', '.join(TASKS)}; "
        f"scores are {', '.join(METRICS)}."
    )
