"""The package's own forwards, which belong to no prompt: they determine a model's results and leave no trace on it.

One of them is a fixed short forward, which shows the layout of a model's KV, and its behaviour (`probed_layers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cake_hf.layers.compat import forward_of, named_for, parameters_of, plain_cache
from cake_hf.model.foreign_code import as_it_is, unobserved
from cake_hf.model.kvpress import Presses
from cake_hf.model.look import home_device, look_again, modules_of, once_per_look
from cake_hf.model.vision import family_of
from cake_hf.util.forks import Lock

_GONE = object()
_lock = Lock()


def run_aside(
    model: torch.nn.Module, pieces: Sequence[torch.Tensor], *, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[Any]]:
    """Runs a model on the pieces of a prompt with a plain cache.

    Args:
        model: a transformers model.
        pieces: `[1, tokens]` each.
        positions: `[1, tokens]` of a single piece. Models that take no positions number the tokens themselves.

    Returns:
        The last token's logits `[1, vocabulary]`, and the layers of the cache.
    """
    cache = plain_cache(model)
    Presses.on(model)
    cache.presses_rest = True
    accepted = parameters_of(forward_of(model))
    arguments: dict[str, Any] = {"use_cache": True, **named_for(model, cache)}
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    if positions is not None and "position_ids" in accepted:
        arguments["position_ids"] = positions
    with _lock, torch.no_grad(), unobserved(), _unchanged(model), as_it_is(model):
        look_again()
        for piece in pieces:
            output = model(input_ids=piece, **arguments)
            logits: torch.Tensor = output[0][:, -1]  # by index: field names change now and then
    return logits, list(cache.layers)


def some_tokens(model: Any, tokens: int, step: int) -> torch.Tensor:
    """Returns `[1, tokens]` ids spread over the vocabulary, the same for every model."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, tokens + 1, device=home_device(model)) * step % vocabulary).unsqueeze(0)


def differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Returns whether two tensors of one shape differ by more than `tolerance` times the first one's norm, or contain a NaN."""
    one, other = one.float(), other.float()
    return not bool((one - other).norm() <= tolerance * one.norm())


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Restores the modules' attributes afterwards, in which they may keep data about a forward (positions, lengths)."""
    before = [(module, dict(vars(module))) for _, module in modules_of(model)]
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update({name: value for name, value in attributes.items() if now.get(name, _GONE) is not value})


TOKENS = 2
"""Tokens of the forward: the fewest that attend to one another. Half are far behind the others, where positions matter more."""
FARTHEST = 8192


@once_per_look
def probed_layers(model: torch.nn.Module) -> list[Any]:
    """Returns the layers of a `DynamicCache` that holds the KV that a model computes for `TOKENS` tokens.

    Within one look the model is run once: a first prompt needs the layout and then the behaviour.

    Args:
        model: of a kind whose layers are known.
    """
    ids = some_tokens(model, TOKENS, 7919)
    return run_aside(model, [ids], positions=_positions(model, ids.device))[1]


def _positions(model: torch.nn.Module, device: torch.device) -> torch.Tensor | None:
    """Returns positions `[1, TOKENS]`, half near the start, half far from it; None if the config gives no maximum position."""
    start = _far_start(model)
    near = torch.arange(TOKENS // 2, device=device)
    return torch.cat([near, near + start]).unsqueeze(0) if start else None


def _far_start(model: Any) -> int:
    """Returns the position of the second half of the tokens; 0 if the config does not determine it."""
    if family_of(model) is not None:  # these models number tokens in several dimensions
        return 0
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 4 * TOKENS:
        return 0
    return min(positions, FARTHEST) - TOKENS // 2
