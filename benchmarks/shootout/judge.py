"""The outcome of a trial: replies, compared with what the system says without a cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from benchmarks.shootout.child import ANSWER, ERROR, HANG, Reply


def without_folders(text: str) -> str:
    """Returns a text in which paths have lost their folders: these say nothing to other people."""
    return re.sub(r"(?:/[\w.@+-]+)+/(?=[\w.@+-])", ".../", text)


class Outcome(StrEnum):
    """What a user of the system gets."""

    SAME = "same tokens"
    WRONG = "wrong tokens"
    ERROR = "error"
    HANG = "hang"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Seen:
    """One reply and what it should have been.

    Attributes:
        what: which question, in words.
        reply: the reply.
        expected: the tokens of the system's own run without a cache.
    """

    what: str
    reply: Reply
    expected: list[int]

    @property
    def outcome(self) -> Outcome:
        """The outcome of this one."""
        if self.reply.kind != ANSWER or self.reply.answer is None:
            return Outcome.HANG if self.reply.kind == HANG else Outcome.ERROR
        return Outcome.SAME if self.reply.answer.tokens == self.expected else Outcome.WRONG

    @property
    def line(self) -> str:
        """What happened, in a line."""
        if self.reply.kind in (ERROR, HANG):
            return f"{self.what}: {self.reply.text}"
        answer = self.reply.answer
        assert answer is not None
        text = f"{self.what}: {self.outcome}"
        if self.outcome == Outcome.WRONG:
            at = next(
                (at for at, pair in enumerate(zip(answer.tokens, self.expected, strict=False)) if pair[0] != pair[1]), 0
            )
            text += f", the first at token {at + 1} of {len(self.expected)}"
        return text if answer.loaded is None else f"{text}; {answer.loaded} tokens not computed"


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        outcome: the worst of what was seen.
        lines: what was seen, a line for each.
        note: more that a reader has to know: what was done in this cell, or why it does not apply.
        loaded: tokens that were not computed, in sum; None if the system does not say.
    """

    outcome: Outcome
    lines: list[str] = field(default_factory=list)
    note: str = ""
    loaded: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        lines = [without_folders(line) for line in self.lines]
        return {**asdict(self), "outcome": str(self.outcome), "lines": lines, "note": without_folders(self.note)}


_WORST = (Outcome.HANG, Outcome.WRONG, Outcome.ERROR, Outcome.SAME)


def judge(seen: Sequence[Seen], note: str = "") -> Cell:
    """Returns the cell of what was seen; the worst counts, and wrong tokens are worse than an error."""
    outcomes = {one.outcome for one in seen}
    worst = next((outcome for outcome in _WORST if outcome in outcomes), Outcome.NOT_APPLICABLE)
    counts = [one.reply.answer.loaded for one in seen if one.reply.answer is not None]
    loaded = sum(count for count in counts if count is not None) if any(count is not None for count in counts) else None
    return Cell(worst, [one.line for one in seen], note, loaded)


def not_applicable(reason: str) -> Cell:
    """Returns the cell of a trial that this system cannot have."""
    return Cell(Outcome.NOT_APPLICABLE, note=reason)
