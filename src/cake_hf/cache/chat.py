"""The tokens that a chat template makes of a document or a conversation, and where its prompts can be cut.

A chat model never sees a text as it is: its template adds a system prompt and special tokens. So the tokens to warm must be
those that the template makes, up to the start of a question; and a conversation is cut where a message ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cake_hf.cache.token_ids import token_ids
from cake_hf.errors import CakeError

SEPARATOR = "\n\n"
"""Stands between a document and a question about it."""

_QUESTIONS = ("What is it?", "a", "7 of them", "(why)", '"Who', "Ünder", "\u4ec0\u4e48")
"""Openings that differ as much as possible: tokens that are equal for all of them do not depend on the question."""

Message = Mapping[str, Any]


class ChatPrompt(NamedTuple):
    """A conversation as the model takes it.

    Attributes:
        input_ids: `[1, tokens]`.
        boundaries: numbers of tokens up to the end of each message, if the template leaves the text up to there unchanged.
    """

    input_ids: torch.Tensor
    boundaries: list[int]


def chat_document(
    tokenizer: Any, document: str, *, system: str = "", separator: str = SEPARATOR, **options: Any
) -> torch.Tensor:
    """Returns the tokens that all questions about a document start with, for a chat model.

        ids = cake_hf.chat_document(tokenizer, document, system="Answer from the text.")
        cache.prefill(ids)

    The question goes into the same message: `{"role": "user", "content": document + separator + question}`.

    Args:
        tokenizer: the tokenizer of a chat model.
        document: the start of the user's first message.
        system: the system prompt; empty for the template's own, if it has one.
        separator: between document and question.
        **options: of `apply_chat_template`.

    Returns:
        `[1, tokens]`.

    Raises:
        CakeError: the tokenizer has no chat template, or the template does not keep the start of a message as it is.
    """
    before = [{"role": "system", "content": system}] if system else []
    rendered = [
        _rendered(tokenizer, [*before, {"role": "user", "content": document + separator + question}], True, options)
        for question in _QUESTIONS
    ]
    common = min(_common(rendered[0], other) for other in rendered[1:])
    if not common:
        raise CakeError(
            "This chat template does not begin with the same tokens for all questions; nothing can be warmed."
        )
    return torch.tensor([rendered[0][:common]])


def chat_prompt(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any
) -> ChatPrompt:
    """Returns a whole conversation, for `cake_hf.generate(model, ids, boundaries=...)`.

    Each turn then finds what earlier turns have stored.

    Args:
        tokenizer: the tokenizer of a chat model.
        messages: the messages of the conversation, each with "role" and "content".
        add_generation_prompt: have the model answer.
        **options: of `apply_chat_template`.

    Raises:
        CakeError: the tokenizer has no chat template.
    """
    ids = _rendered(tokenizer, messages, add_generation_prompt, options)
    boundaries = []
    for count in range(1, len(messages) + 1):
        try:
            part = _rendered(tokenizer, messages[:count], False, options)
        except CakeError:
            raise
        except Exception:  # templates refuse some conversations, such as a system prompt alone
            continue
        if part and len(part) < len(ids) and ids[: len(part)] == part:
            boundaries.append(len(part))
    return ChatPrompt(torch.tensor([ids]), boundaries)


def _rendered(tokenizer: Any, messages: Sequence[Message], answer: bool, options: Mapping[str, Any]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None) and "chat_template" not in options:
        raise CakeError(
            "This tokenizer has no chat template: the model is no chat model, or its template was not saved with it; use the "
            "text as it is, or set tokenizer.chat_template."
        )
    given = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=answer, **{**options, "return_tensors": None}
    )
    found: list[int] = token_ids(given)[0].tolist()
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
