"""Several methods on several documents: score and TTFT, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.figures import Figure, Result
from benchmarks.timing import Sample
from benchmarks.traces.questions import Document
from benchmarks.traces.turns import Answered, Method
from eval.scores import score
from eval.tasks import Task


def compare(
    model: Any,
    tokenizer: Any,
    task: Task,
    documents: Sequence[Document],
    methods: Mapping[str, Method],
    tell: Callable[[], None] = lambda: None,
) -> Result:
    """Returns score and TTFT of each method; the methods take turns, document by document.

    Raises:
        ValueError: there are no documents.
    """
    if not documents:
        raise ValueError(
            f"{task.name} has no document with two questions that fit the model; allow more --tokens or rows."
        )
    found: dict[str, list[Answered]] = {name: [] for name in methods}
    names = list(methods)
    for number, document in enumerate(documents):
        at = number % len(names)
        for name in [*names[at:], *names[:at]]:
            found[name].append(methods[name](model, document.ids, document.turns))
            tell()
    rows = {name: _row(tokenizer, task, documents, answered) for name, answered in found.items()}
    first = names[0]
    figures = {}
    for name in names[1:]:
        ratios = [ttft / other for ttft, other in zip(_later(found[name]), _later(found[first]), strict=True)]
        figures[name] = Figure(
            f"TTFT of later turns over {first}, {name}", median(ratios), *Sample(tuple(ratios)).spread, "x"
        )
    details = {
        "task": task.name,
        "documents": len(documents),
        "tokens": mean(document.ids.shape[1] for document in documents),
        "methods": rows,
    }
    return Result(f"{task.name}, {len(documents)} documents", figures, details)


def _row(tokenizer: Any, task: Task, documents: Sequence[Document], answered: Sequence[Answered]) -> dict[str, Any]:
    scores, ttfts = [], [one.ttfts for one in answered]
    for document, one in zip(documents, answered, strict=True):
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in one.answers]
        rows = zip(texts, document.rows, strict=True)
        scores.append([score(task, text, row.answers, row.classes) for text, row in rows])
    return {
        "score": mean(value for one in scores for value in one),
        "scores": _by_turn(scores, mean),
        "ttfts": _by_turn(ttfts, median),
        "answers": [list(map(list, one.answers)) for one in answered],
    }


def _by_turn(values: Sequence[Sequence[float]], middle: Callable[[Iterable[float]], float]) -> list[float]:
    """Returns a mean or median for each turn, over the documents that have as many."""
    turns = max(map(len, values))
    return [middle([one[turn] for one in values if turn < len(one)]) for turn in range(turns)]


def _later(answered: Sequence[Answered]) -> list[float]:
    return [ttft for one in answered for ttft in one.ttfts[1:]]
