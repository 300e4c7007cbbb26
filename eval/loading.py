"""Loads the run's model and tokenizer."""

from __future__ import annotations

from typing import Any

from cake_hf.assets import RECALL_TINY
from cake_hf.cli.models import load_model, load_tokenizer
from eval.config import RunConfig

OWN_MODEL = "recall-tiny"


def load(config: RunConfig) -> tuple[Any, Any]:
    """Returns (model, tokenizer).

    Raises:
        ValueError: one of them cannot be loaded; the message says what to do.
    """
    return load_model(_place(config.model), config.dtype, config.device), load_run_tokenizer(config)


def load_run_tokenizer(config: RunConfig) -> Any:
    """Returns the tokenizer alone.

    Raises:
        ValueError: there is none.
    """
    try:
        return load_tokenizer(_place(config.tokenizer or config.model))
    except ValueError as error:
        raise ValueError(f"{error} If it is elsewhere, say --tokenizer.") from error


def _place(name: str) -> str:
    return str(RECALL_TINY) if name == OWN_MODEL else name
