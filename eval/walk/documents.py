"""The documents of the walk: rows of LongBench, if the user has them, or Python's own sources with facts hidden in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cake_hf import chat_document, chat_prompt
from cake_hf.cache.chat import SEPARATOR
from eval.data.sources import Source, load_rows
from eval.tasks import find_task

TASKS = ("qasper", "2wikimqa")
QUESTIONS = ("What is the main topic of this text?", "Name one person, place or thing that it mentions.")
"""Questions of our own, so that nothing of a benchmark is printed or kept."""

GENERATED = "recall"
SAMPLE_CHARS = 4000
"""This many characters tell how long a token is."""


@dataclass(frozen=True)
class Document:
    """A document and two questions about it, as tokens.

    Attributes:
        name: its source.
        ids: `[1, tokens]`, which the questions start with.
        questions: as text.
        prompts: `[1, tokens]` each.
    """

    name: str
    ids: torch.Tensor
    questions: tuple[str, ...]
    prompts: tuple[torch.Tensor, ...]


def find_documents(data: str, wanted: Sequence[int], tokenizer: Any, limit: int) -> list[Document]:
    """Returns a document for each number of tokens, of about that length.

    Args:
        data: a folder with LongBench's rows, of which those of about these lengths are taken whole; empty for made-up ones.
        wanted: numbers of tokens.
        tokenizer: of the model.
        limit: of tokens, of prompt and answer together.

    Raises:
        MissingData: the folder has no rows.
        ValueError: a prompt would be too long for the model.
    """
    texts = list(_real(data, wanted, tokenizer) if data else _made_up(wanted, tokenizer))
    documents = [make_document(tokenizer, *text) for text in texts]
    for document in documents:
        tokens = max(prompt.shape[1] for prompt in document.prompts)
        if tokens > limit:
            raise ValueError(
                f"The prompt of {document.name} has {tokens:,} tokens, there is room for {limit:,}; ask for less."
            )
    return documents


def make_document(tokenizer: Any, name: str, text: str, questions: Sequence[str]) -> Document:
    """Renders in the model's chat template, if it has one; else the text, and the question right behind it."""
    if getattr(tokenizer, "chat_template", None):
        ids = chat_document(tokenizer, text)
        messages = [[{"role": "user", "content": f"{text}{SEPARATOR}{question}"}] for question in questions]
        prompts = [chat_prompt(tokenizer, message).input_ids for message in messages]
    else:
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        tails = [tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids for question in questions]
        prompts = [torch.cat([ids, tail], dim=1) for tail in tails]
    return Document(name, ids, tuple(questions), tuple(prompts))


def _real(data: str, wanted: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, str, Sequence[str]]]:
    rows = [row for task in TASKS for row in load_rows(find_task(task), Source(data=data)).rows]
    counts = [len(ids) for ids in tokenizer([row.document for row in rows], verbose=False).input_ids]
    for tokens in wanted:
        nearest = min(range(len(rows)), key=lambda at: abs(counts[at] - tokens))
        row = rows[nearest]
        yield f"LongBench, {row.task}", row.document, QUESTIONS


def _made_up(wanted: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, str, Sequence[str]]]:
    task = find_task(GENERATED)
    sample = load_rows(task, Source("generated", rows=1, chars=SAMPLE_CHARS)).rows[0].document
    length = len(sample) / len(tokenizer(sample, verbose=False).input_ids)
    for tokens in wanted:
        one, other = load_rows(task, Source("generated", rows=2, chars=int(tokens * length))).rows
        yield "Python's sources, with facts hidden in them", one.document, (one.question, other.question)
