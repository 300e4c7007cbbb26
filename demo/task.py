"""The task of the demonstration: a long text, a question about it and, if the text is ours, the right answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cake_hf.testing.haystack import hide, make_facts, question, real_text

FACT_PLACES = (0.2, 0.5, 0.8)
ASKED = 1
"""The fact that is asked for: one from the middle of the text."""

CHARS_PER_TOKEN = 8
"""More characters per token than any tokenizer makes of source code on average: enough text to cut a prompt from."""


@dataclass(frozen=True)
class Task:
    """A prompt and what is known of it.

    Attributes:
        ids: `[1, tokens]`.
        question: as shown.
        answer: the right one; empty if it is unknown.
        source: of the text.
    """

    ids: torch.Tensor
    question: str
    answer: str
    source: str


def make_task(tokenizer: Any, text: str | None, asked: str, tokens: int | None) -> Task:
    """Builds a prompt.

    Args:
        tokenizer: of the model.
        text: the user's; None for source files of the installed Python.
        asked: the user's question; empty to hide facts in the text and ask for one of them.
        tokens: length of the text, which is cut if it is longer; None for all of it.
    """
    source = "your file" if text is not None else "Python's own source files"
    if text is None:
        text = real_text(CHARS_PER_TOKEN * (tokens or 8192))
    text = _cut(tokenizer, text, tokens)
    if asked:
        return Task(_ask(tokenizer, text, asked), asked, "", source)
    facts = make_facts(len(FACT_PLACES))
    fact = facts[ASKED]
    prompt = hide(text, facts, FACT_PLACES) + question(fact.key)
    return Task(_encode(tokenizer, prompt), question(fact.key), fact.answer, f"{source} and {len(facts)} hidden facts")


def _cut(tokenizer: Any, text: str, tokens: int | None) -> str:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if tokens is None or len(ids) <= tokens:
        return text
    return str(tokenizer.decode(ids[:tokens]))


def _ask(tokenizer: Any, text: str, asked: str) -> torch.Tensor:
    """Renders a chat message if the model has a chat template, and plain text otherwise."""
    if not getattr(tokenizer, "chat_template", None):
        return _encode(tokenizer, f"{text}\n\nQuestion: {asked}\nAnswer:")
    messages = [{"role": "user", "content": f"{text}\n\n{asked}"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return _encode(tokenizer, prompt, add_special_tokens=False)


def _encode(tokenizer: Any, prompt: str, *, add_special_tokens: bool = True) -> torch.Tensor:
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=add_special_tokens, verbose=False)
    ids: torch.Tensor = encoded.input_ids
    return ids
