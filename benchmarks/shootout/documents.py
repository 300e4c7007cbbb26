"""The documents of a run, and the questions about them, for all systems alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.shootout.questions import Question
from cake_hf.cli.models import load_tokenizer
from eval.data.sources import Source, load_rows
from eval.tasks import find_task

TASK, MADE_UP = "multifieldqa_en", "recall"
CHARS_PER_TOKEN = 8
TRIES = 200
ROWS = 8
"""Made-up rows for each document that is wanted: several are about the same one."""

ASKED = (
    "What is the main topic of this text?",
    "Name one person, place or thing that it mentions.",
    "Which number does it mention first?",
    "How does it end?",
)
"""Questions of our own, so that nothing of a benchmark is printed or kept."""


def make_questions(model: str, data: str, tokens: int, new: int, documents: int) -> list[list[Question]]:
    """Returns for each document its questions, as many as ASKED.

    Args:
        model: whose tokenizer counts.
        data: a folder with LongBench's rows; empty for made-up documents.
        tokens: of a document, exactly.
        new: tokens of each answer.
        documents: how many.

    Raises:
        ValueError: there are not enough texts of that length.
    """
    tokenizer = load_tokenizer(model)
    source = Source(data) if data else Source("generated", rows=documents * ROWS, chars=tokens * CHARS_PER_TOKEN)
    rows = load_rows(find_task(TASK if data else MADE_UP), source).rows
    found: list[list[Question]] = []
    for row in rows:
        if len(found) == documents:
            break
        text = row.document
        if len(text) < tokens or (cut := _cut(tokenizer, text, tokens)) is None:
            continue
        several = [_question(tokenizer, cut, tokens, asked, new) for asked in ASKED]
        if all(several[0].name != others[0].name for others in found):
            found.append(several)
    if len(found) < documents:
        raise ValueError(
            f"There are {len(found)} texts of {tokens} tokens, {documents} are needed; choose fewer --tokens."
        )
    return found


def _cut(tokenizer: Any, text: str, tokens: int) -> str | None:
    """Returns a piece of the text with that many tokens, which every question leaves as they are; None if there is none."""
    for begin in range(TRIES):
        ids = _ids(tokenizer, text[begin:])[:tokens]
        if len(ids) < tokens:
            return None
        piece: str = tokenizer.decode(ids)
        if all(_ids(tokenizer, piece + _tail(asked))[:tokens] == ids for asked in ASKED):
            return piece
    return None


def _question(tokenizer: Any, document: str, tokens: int, asked: str, new: int) -> Question:
    text = document + _tail(asked)
    return Question(_ids(tokenizer, text), tokens, text, new)


def _tail(asked: str) -> str:
    return f"\n\nQuestion: {asked}\nAnswer:"


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: Sequence[int] = tokenizer(text, verbose=False).input_ids
    return list(ids)
