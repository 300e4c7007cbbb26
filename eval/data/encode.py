"""From a row to token ids: chat template or plain text, cut in the middle if it is too long for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.data.prompts import Template
from eval.data.rows import BrokenRow, Row
from eval.tasks import Task

MOST_CUTS = 8
"""Cutting changes how the text around the cut is tokenized, so a prompt may still be some tokens too long."""


class TooLong(BrokenRow):
    """The row is too long for the model."""


@dataclass(frozen=True)
class Prompt:
    """A row as the model gets it.

    Attributes:
        task, row: its task's name and its id.
        ids: token ids.
        new_tokens: the most tokens to generate.
        cut: tokens left out of the middle.
    """

    task: str
    row: str
    ids: tuple[int, ...]
    new_tokens: int
    cut: int = 0


@dataclass(frozen=True)
class Encoder:
    """Makes prompts for one model.

    Attributes:
        tokenizer: of the model.
        limit: tokens of prompt and answer together; None for no limit.
        truncate: cut longer prompts in the middle; otherwise they are refused.
        new_tokens: instead of the task's number; None for that.
    """

    tokenizer: Any
    limit: int | None
    truncate: bool = True
    new_tokens: int | None = None

    def prompt(self, task: Task, template: Template, row: Row) -> Prompt:
        """Returns the prompt of a row.

        Raises:
            TooLong: it does not fit, and may not be cut or would be cut to nothing.
        """
        new_tokens = self.new_tokens or task.new_tokens
        said = template.messages(row)
        ids = self._encode(task, said)
        if self.limit is None or len(ids) + new_tokens <= self.limit:
            return Prompt(task.name, row.id, tuple(ids), new_tokens)
        if not self.truncate:
            raise TooLong(f"it has {len(ids):,} tokens and up to {new_tokens} new ones, the limit is {self.limit:,}")
        shorter = self._cut(task, said, len(ids), self.limit - new_tokens)
        return Prompt(task.name, row.id, tuple(shorter), new_tokens, cut=len(ids) - len(shorter))

    def _cut(self, task: Task, said: Sequence[str], tokens: int, room: int) -> list[int]:
        """Cuts as LongBench does: the first message keeps its two ends, in equal parts; later messages stay whole."""
        first: list[int] = self.tokenizer(said[0], add_special_tokens=False, verbose=False).input_ids
        keep = len(first)
        for _ in range(MOST_CUTS):
            keep -= max(1, tokens - room)
            if keep < 2:
                break
            ends = [first[: keep // 2], first[-(keep // 2) :]]
            text = "".join(self.tokenizer.decode(end, skip_special_tokens=True) for end in ends)
            ids = self._encode(task, [text, *said[1:]])
            if len(ids) <= room:
                return ids
            tokens = len(ids)
        raise TooLong(f"it has {tokens:,} tokens and cannot be cut to the {max(0, room):,} there is room for")

    def _encode(self, task: Task, said: Sequence[str]) -> list[int]:
        chat = task.chat and bool(getattr(self.tokenizer, "chat_template", None))
        text = self._as_chat(said) if chat else _as_text(said)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
        return ids

    def _as_chat(self, said: Sequence[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(said)]
        # Answers are short here: a model that thinks aloud first would never reach its answer.
        return str(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
        )


def _as_text(said: Sequence[str]) -> str:
    """Renders without a chat template: each answer follows its question, and an empty line follows the answer."""
    text = said[0]
    for answer, question in zip(said[1::2], said[2::2], strict=True):
        text += f" {answer}\n\n{question}"
    return text
