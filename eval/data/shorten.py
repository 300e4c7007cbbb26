"""Documents of fewer tokens, in which a question can still be answered."""

from __future__ import annotations

from typing import Any

from eval.data.rows import Row
from eval.tasks import Task

CHARS_PER_TOKEN = 3
"""Cautious, so that what is cut by characters need not be cut again by tokens."""


def shortened(tokenizer: Any, task: Task, row: Row, tokens: int) -> str:
    """Returns at most so many tokens of a document: of a question's document what stands around the answer, if it has that.

    Other documents lose their middle, as in LongBench. With so few tokens that would mostly leave out what a question asks for.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    text, half = row.document, tokens // 2
    whole = ids_of(text)
    if len(whole) <= tokens:
        return text
    places = [place for answer in row.answers if answer and (place := text.find(answer)) >= 0]
    if task.metric == "qa_f1" and not task.first_line and places:
        before, after = ids_of(text[: places[0]]), ids_of(text[places[0] :])
        first = max(0, min(len(before) - half, len(before) + len(after) - tokens))
        kept = [[*before, *after][first : first + tokens]]
    else:
        kept = [whole[:half], whole[len(whole) - half :]]
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in kept)
