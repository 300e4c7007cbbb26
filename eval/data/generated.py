"""Records of our own, in the benchmarks' schemas: real text (Python's own source files), made-up questions.

The facts of `recall` are hidden in the text, so the package's small model can answer. For every other task the text is only
something to read, and the answers have the form that the task's score expects.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

from cake_hf.testing.haystack import hide, make_facts, question, real_text
from eval.tasks import LONGBENCH_V2, SCBENCH, Task

GENERATED_ROWS = 4
"""Records of a task, if no number is given."""

QUESTIONS_PER_DOCUMENT = 2
FACTS = 12
_POOL_CHARS = 2_000_000
_CLASSES = ["Date", "Food", "Place", "Other entity", "Other"]

_ANSWERS = {
    "qa_f1": "a list of names",
    "qa_f1_zh": "名字的列表",
    "rouge_l": "The module reads lines. It returns a list.",
    "rouge_l_zh": "这个模块读取文本",
    "classification": "Place",
    "count": "7",
    "retrieval": "Paragraph 3",
    "retrieval_zh": "段落3",
    "code_similarity": "    return result",
    "choice": "B",
    "contains": "return",
}


def generate(task: Task, rows: int, seed: int, chars: int) -> Iterator[dict[str, Any]]:
    """Returns records; the same ones for the same arguments (and the same Python, whose sources they quote).

    Args:
        task: the one whose schema they have.
        rows: their number; two at a time share a document.
        seed: of texts, facts and questions.
        chars: of each document.
    """
    pool = _pool()
    for number in range(rows):
        document, place = divmod(number, QUESTIONS_PER_DOCUMENT)
        rng = random.Random(f"{seed}/{task.name}/{document}")
        start = rng.randrange(max(1, len(pool) - chars))
        text = pool[start : start + chars]
        yield _record(task, text, place, rng.randrange(2**31), f"{task.name}-{number}")


@cache
def _pool() -> str:
    return real_text(_POOL_CHARS)


def _record(task: Task, text: str, place: int, seed: int, name: str) -> dict[str, Any]:
    asked = f"What is on line {place + 1}?"
    if task.name == "recall":
        facts = make_facts(FACTS, seed)
        fact = facts[place]
        return _longbench(task, name, hide(text, facts, seed=seed), question(fact.key), fact.value)
    answer = _ANSWERS[task.metric]
    if task.suite == LONGBENCH_V2:
        choices = {f"choice_{letter}": f"line {letter}" for letter in "ABCD"}
        return {"_id": name, "question": asked, **choices, "answer": answer, "context": text}
    if task.suite == SCBENCH:
        turns = [{"input": asked, "answer": answer}, {"input": "And below it?", "answer": answer}]
        return {"id": name, "context": text, "multi_turns": turns}
    return _longbench(task, name, text, asked, answer)


def _longbench(task: Task, name: str, context: str, asked: str, answer: str) -> dict[str, Any]:
    return {
        "_id": name,
        "dataset": task.name,
        "language": "zh" if task.chinese else "en",
        "input": asked,
        "context": context,
        "answers": [answer],
        "all_classes": _CLASSES if task.metric == "classification" else None,
        "length": len(context.split()),
    }
