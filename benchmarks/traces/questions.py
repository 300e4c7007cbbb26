"""Documents with several questions each, as token ids: rows of SCBench, or examples of LongBench in SCBench's form.

LongBench asks one question per document. Its few-shot tasks have many examples in a document, though: the last ones become the
turns, with the answers that stand there, and the others the document that they share, as in SCBench's many-shot task. Of its
other questions several rows become one document: what stands around the answers, one behind the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from benchmarks.traces.turns import Turn
from eval.data.encode import Encoder, TooLong
from eval.data.prompts import Template
from eval.data.rows import Row
from eval.data.shorten import shortened
from eval.tasks import Task

SHOTS = {"trec": ("Question:", "\nType:"), "samsum": ("Dialogue:", "\nSummary:"), "triviaqa": ("Passage:", "\nAnswer:")}
"""By task, what an example begins with, and what stands before its answer."""


@dataclass(frozen=True)
class Document:
    """One document with its questions.

    Attributes:
        ids: `[1, tokens]`, what all prompts begin with.
        turns: the questions.
        rows: of the turns, with the right answers.
    """

    ids: torch.Tensor
    turns: tuple[Turn, ...]
    rows: tuple[Row, ...]


def documents_of(task: Task, rows: Sequence[Row], template: Template, encoder: Encoder) -> Iterator[Document]:
    """Returns the documents of which at least two questions fit the model.

    Args:
        task: of the rows.
        rows: those of one document one after the other.
        template: the wording.
        encoder: for the model; it must not cut prompts, as they would not begin alike any more.
    """
    for _, together in groupby(rows, key=lambda row: row.document):
        fitting = []
        for row in together:
            try:
                fitting.append((row, encoder.prompt(task, template, row)))
            except TooLong:
                continue
        if len(fitting) < 2:
            continue
        prompts = [list(prompt.ids) for _, prompt in fitting]
        shared = _shared(prompts)
        turns = tuple(Turn(torch.tensor([prompt.ids[shared:]]), prompt.new_tokens) for _, prompt in fitting)
        yield Document(torch.tensor([prompts[0][:shared]]), turns, tuple(row for row, _ in fitting))


def many_shot(row: Row, turns: int, chars: int) -> list[Row]:
    """Returns the last examples of a few-shot row as questions about the ones before them; none if it has too few.

    Args:
        row: of a task in `SHOTS`.
        turns: most questions.
        chars: most characters of the document, from whose front whole examples are left out.
    """
    begin, mark = SHOTS[row.task]
    examples = [text for text in re.split(rf"^(?={begin})", row.document, flags=re.MULTILINE) if mark in text]
    document = ""
    for example in reversed(examples[:-turns]):
        if len(document) + len(example) > chars:
            break
        document = example + document
    asked: list[Row] = []
    for number, example in enumerate(examples[-turns:] if document else []):
        question, answer = example.rsplit(mark, 1)
        history = tuple((one.question, one.answers[0]) for one in asked)
        right = (answer.strip(),)
        asked.append(
            replace(
                row,
                id=f"{row.id}/{number}",
                document=document,
                question=question + mark,
                answers=right,
                history=history,
            )
        )
    return asked


def gathered(tokenizer: Any, task: Task, rows: Sequence[Row], turns: int, tokens: int) -> list[Row]:
    """Returns rows that share documents: of so many rows at a time, what stands around their answers.

    Args:
        tokenizer: of the model.
        task: of the rows.
        rows: each with a document of its own.
        turns: questions about each document.
        tokens: of each document, the same for each of its rows.
    """
    found: list[Row] = []
    for start in range(0, len(rows), turns):
        together = rows[start : start + turns]
        document = "\n\n".join(shortened(tokenizer, task, row, tokens // turns) for row in together)
        asked: tuple[tuple[str, str], ...] = ()
        for row in together:
            found.append(replace(row, document=document, history=asked))
            asked = (*asked, (row.question, row.answers[0]))
    return found


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens all prompts begin with; each keeps at least one."""
    most = min(len(prompt) for prompt in prompts) - 1
    same = (len({prompt[at] for prompt in prompts}) == 1 for at in range(most))
    return next((at for at, equal in enumerate(same) if not equal), most)
