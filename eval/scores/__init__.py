"""The scores of LongBench, written from their definitions; `score` alone knows which task uses which."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.scores.rouge import rouge_l, rouge_l_zh
from eval.scores.rules import (
    BrokenAnswer,
    choice,
    classification,
    code_similarity,
    contains,
    count,
    retrieval,
    retrieval_zh,
)
from eval.scores.text import MissingSegmenter, qa_f1, qa_f1_zh
from eval.tasks import Task

__all__ = ["METRICS", "BrokenAnswer", "MissingSegmenter", "score", "score_answer"]

_PLAIN: dict[str, Callable[[str, str], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_similarity": code_similarity,
    "choice": choice,
    "contains": contains,
}

METRICS: tuple[str, ...] = (*_PLAIN, "classification")
"""Names of all scores; only `classification` needs the task's classes."""


def score(task: Task, prediction: str, answers: Sequence[str], classes: Sequence[str] | None = None) -> float:
    """Returns the task's score of a prediction, 0 to 1: the best over the answers; 0 if there is none.

    Args:
        task: the one whose metric and first-line rule count.
        prediction: as generated, without the prompt.
        answers: each of them is right.
        classes: of the task, if it has classes.

    Raises:
        BrokenAnswer: this task cannot use these answers or classes.
        MissingSegmenter: a Chinese task, and jieba is not installed.
    """
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((score_answer(task.metric, prediction, answer, classes) for answer in answers), default=0.0)


def score_answer(metric: str, prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """Returns one metric, against one answer.

    Raises:
        BrokenAnswer, MissingSegmenter: as `score`.
    """
    if metric != "classification":
        return _PLAIN[metric](prediction, answer)
    if not classes:
        raise BrokenAnswer("this task needs all_classes, the list of its classes")
    return classification(prediction, answer, classes)
