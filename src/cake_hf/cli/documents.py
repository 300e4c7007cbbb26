"""A document as a prompt: the tokens of a text, its cuts, and the model that it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cake_hf.blocks import Block, blocks, checked_cuts
from cake_hf.cache import chat_document
from cake_hf.cli.console import console
from cake_hf.cli.models import load_model, load_tokenizer, read_text
from cake_hf.cli.options import WarmedOptions


@dataclass(frozen=True)
class Document:
    """A text, and how it becomes tokens; see the options of `cake-hf warm`.

    Attributes:
        text: the text of the document.
        chat: whether it is placed in the model's chat template.
        system: the system prompt; with `chat`.
        tokens: how many tokens to keep, from the start; None for all.
        boundaries: declared cuts, in addition to the end.
    """

    text: str
    chat: bool = False
    system: str = ""
    tokens: int | None = None
    boundaries: Sequence[int] = ()

    def ids(self, tokenizer: Any) -> torch.Tensor:
        """Returns the token ids, `[1, tokens]`.

        Raises:
            CakeError: the tokenizer has no suitable chat template.
            ValueError: a boundary is outside of the tokens.
        """
        if self.chat:
            ids = chat_document(tokenizer, self.text, system=self.system)
        else:
            ids = tokenizer(self.text, return_tensors="pt", verbose=False).input_ids
        ids = ids[:, : self.tokens]
        checked_cuts(self.boundaries, ids.shape[1])
        return ids

    def blocks(self, tokens: int, size: int) -> list[Block]:
        """Returns the chunks and tails of that many tokens, with chunks of that size; the last one may be a tail."""
        return blocks(0, tokens, checked_cuts(self.boundaries, tokens), size)


def read_document(
    path: Path, chat: bool, system: Path | None, tokens: int | None, boundaries: Sequence[int]
) -> Document:
    """Reads the files of a document, which needs no model.

    Raises:
        ValueError: a file cannot be read, or there is a system prompt without `chat`.
    """
    if system is not None and not chat:
        raise ValueError("--system is for --chat: without a chat template there is no system prompt.")
    return Document(read_text(path), chat, "" if system is None else read_text(system), tokens, tuple(boundaries))


def load_with(name: str, documents: Sequence[Document], warmed: WarmedOptions) -> tuple[Any, list[torch.Tensor]]:
    """Loads the model of warmed documents; returns it with their token ids, `[1, tokens]` each.

    Raises:
        CakeError, ValueError: the model cannot be loaded, or a document cannot be turned into ids (see `Document.ids`).
    """
    with console.status("loading the model"):
        tokenizer = load_tokenizer(name)
        ids = [document.ids(tokenizer) for document in documents]
        return load_model(name, warmed.dtype.value, warmed.device), ids


def read_warmed(path: Path, warmed: WarmedOptions) -> Document:
    """Calls `read_document` with these options."""
    return read_document(path, warmed.chat, warmed.system, warmed.tokens, warmed.boundary or ())
