"""The outcome of one run of one prompt, small enough to be kept: tokens, a digest of each step's logits, times and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import xxhash

from demo.asking import Answer


@dataclass(frozen=True)
class Outcome:
    """One mode of one row.

    Attributes:
        task, row, mode: which.
        tokens: the generated ones.
        digests: xxh3-128 of the logits that each token was chosen from; equal digests mean equal bits.
        margins: the lead of the best logit over the second, at each of these steps.
        text: the tokens as text.
        ttft: seconds to the first token.
        prompt_tokens: length of the prompt.
        cut: tokens left out of the prompt's middle.
        loaded, computed, missed, failed, unsaved: chunks, as in the cache's report.
        note: why nothing was restored, or what this mode did differently than intended; empty otherwise.
        error: the error; empty if there was none.
    """

    task: str
    row: str
    mode: str
    tokens: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    text: str = ""
    ttft: float = 0.0
    prompt_tokens: int = 0
    cut: int = 0
    loaded: int = 0
    computed: int = 0
    missed: int = 0
    failed: int = 0
    unsaved: int = 0
    note: str = ""
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The task, row and mode."""
        return self.task, self.row, self.mode

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Outcome:
        """Returns the outcome that `as_dict` was called on.

        Raises:
            TypeError: it is something else.
        """
        if {setting.name for setting in fields(cls)} != set(plain):
            raise TypeError("not an outcome")
        return cls(**plain)


def digests(answer: Answer) -> list[str]:
    """Returns one digest per generated token, over the bits of its logits: 0 is not -0."""
    return [xxhash.xxh3_128_hexdigest(step.view(torch.uint8).numpy().data) for step in answer.logits]


def margins(answer: Answer) -> list[float]:
    """Returns the lead of the best logit over the second, at each step."""
    best = answer.logits.float().topk(2, dim=-1).values
    return [float(lead) for lead in best[:, 0] - best[:, 1]]


def first_difference(one: Sequence[object], other: Sequence[object]) -> int | None:
    """Returns where two sequences start to differ, counted from 0; None if they are equal."""
    for position, pair in enumerate(zip(one, other, strict=False)):
        if pair[0] != pair[1]:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))
