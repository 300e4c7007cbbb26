"""The work of a run: the rows of its tasks as prompts, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from eval.config import RunConfig
from eval.data.encode import Encoder, Prompt, TooLong
from eval.data.prompts import load_templates
from eval.data.rows import Row
from eval.data.sources import Source, load_rows
from eval.tasks import find_task


@dataclass
class Work:
    """The prompts to be run.

    Attributes:
        rows: by (task, id).
        prompts: of these, in order; those about one document follow each other.
        skipped: "task/row" -> why it is not run.
    """

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    prompts: list[Prompt] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def batches(self, tokens: int) -> Iterator[list[Prompt]]:
        """Yields prompts whose KV is stored at the same time: that many tokens, but never less than all about one document."""
        batch: list[Prompt] = []
        for _, group in groupby(self.prompts, key=lambda prompt: self.rows[prompt.task, prompt.row].document):
            together = list(group)
            if batch and sum(len(prompt.ids) for prompt in batch + together) > tokens:
                yield batch
                batch = []
            batch += together
        if batch:
            yield batch


def find_work(config: RunConfig, model: Any, tokenizer: Any) -> Work:
    """Returns all rows of all tasks, as prompts. Those that cannot be run are counted, with the reason.

    Raises:
        BrokenPrompts, MissingData: there is nothing to run a task with.
    """
    work = Work()
    templates = load_templates(Path(config.prompts).expanduser() if config.prompts else None)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (config.max_tokens, positions) if limit]
    encoder = Encoder(tokenizer, min(limits, default=None), config.too_long == "truncate", config.new_tokens)
    source = Source(config.data, config.hub, config.rows, config.seed, config.chars)
    for name in config.tasks:
        task, found = find_task(name), load_rows(find_task(name), source)
        work.skipped |= {f"{name}/{which}": reason for which, reason in found.skipped.items()}
        for row in found.rows:
            _take_in(work, row, partial(encoder.prompt, task, templates[name], row))
    return work


def _take_in(work: Work, row: Row, make: Callable[[], Prompt]) -> None:
    name = f"{row.task}/{row.id}"
    if (row.task, row.id) in work.rows:
        work.skipped[name] = "another row has the same id"
        return
    try:
        prompt = make()
    except TooLong as error:
        work.skipped[name] = str(error)
        return
    work.rows[row.task, row.id] = row
    work.prompts.append(prompt)
