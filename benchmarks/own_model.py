"""`python -m benchmarks --model NAME`: settings, model and prompt for a model of the user's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.figures import Result
from benchmarks.settings import Settings, Shape, choose
from cake_hf.cli.models import load_config, load_model, load_tokenizer, quiet_transformers, refuse_too_long
from cake_hf.testing.haystack import real_text

USUAL_TOKENS = 2048
ROOM = 128
"""Positions reserved for the prompt's suffix and for new tokens."""

CHARS_PER_TOKEN = 8


def own_settings(
    name: str,
    *,
    quick: bool,
    repeats: int | None,
    tokens: int | None,
    chunk_size: int | None,
    dtype: str,
    device: str,
) -> Settings:
    """Works like `settings.choose`, for a model by name; the prompt is shorter by default, as such models are larger.

    Raises:
        ValueError: there is no such model, or the prompt does not fit it.
    """
    config = load_config(name)
    text = config.get_text_config()
    if tokens is None and not quick:
        limit = getattr(text, "max_position_embeddings", None)
        tokens = min(USUAL_TOKENS, limit - ROOM) if limit else USUAL_TOKENS
    settings = choose(
        quick=quick,
        repeats=repeats or (2 if quick else 3),
        tokens=tokens,
        chunk_size=chunk_size,
        dtype=dtype,
        device=device,
        shape="tiny",
    )
    refuse_too_long(config, settings.tokens + ROOM, "choose fewer --tokens.")
    heads = text.num_attention_heads
    shape = Shape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        intermediate=getattr(text, "intermediate_size", None) or 0,
        vocabulary=text.vocab_size,
    )
    return replace(settings, shape=shape, model=name)


def own_model(settings: Settings) -> Any:
    """Returns the model, set to generate as many tokens as it is asked for."""
    with quiet_transformers():
        model = load_model(settings.model, settings.dtype, settings.device)
    model.generation_config.eos_token_id = None
    return model


def own_prompt(settings: Settings) -> torch.Tensor:
    """Returns `[1, tokens + suffix_tokens]` tokens of real text; any tokens if the model has no tokenizer."""
    length = settings.tokens + settings.suffix_tokens
    try:
        tokenizer = load_tokenizer(settings.model)
    except ValueError:
        return torch.randint(0, settings.shape.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    text = real_text(CHARS_PER_TOKEN * length)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length].to(settings.device)


def without_goals(result: Result) -> Result:
    """Drops the goals, which are those of the bench's own models."""
    return replace(result, figures={name: replace(figure, goal=None) for name, figure in result.figures.items()})
