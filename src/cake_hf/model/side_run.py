"""The package's own forwards, which belong to no prompt: they determine a model's results and leave no trace on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cake_hf.layers.compat import forward_of, named_for, parameters_of, plain_cache
from cake_hf.model.compiled import as_it_is
from cake_hf.model.foreign_code import unobserved
from cake_hf.model.kvpress import Presses
from cake_hf.model.look import look_again
from cake_hf.model.modules import modules_of
from cake_hf.model.offload import home_device
from cake_hf.model.ranks import ranks_of
from cake_hf.model.which_model import is_from_transformers
from cake_hf.util.forks import Lock

_GONE = object()
_lock = Lock()


def run_aside(
    model: torch.nn.Module,
    pieces: Sequence[torch.Tensor],
    *,
    positions: torch.Tensor | None = None,
    for_kv: bool = False,
) -> tuple[torch.Tensor, list[Any]]:
    """Runs a model on the pieces of a prompt with a plain cache.

    Args:
        model: a transformers model.
        pieces: `[1, tokens]` each.
        positions: `[1, tokens]` of a single piece. Models that take no positions number the tokens themselves.
        for_kv: only the KV is wanted, so logits are computed only if the model cannot do without.

    Returns:
        The last token's logits `[1, vocabulary]`, or no logits, and the layers of the cache.
    """
    cache = plain_cache(model)
    Presses.on(model)
    cache.presses_rest = True
    accepted = parameters_of(forward_of(model))
    arguments: dict[str, Any] = {"use_cache": True, **named_for(model, cache)}
    if "logits_to_keep" in accepted:
        none = for_kv and _can_do_without_logits(model)
        arguments["logits_to_keep"] = torch.empty(0, dtype=torch.long) if none else 1
    if positions is not None and "position_ids" in accepted:
        arguments["position_ids"] = positions
    with _lock, torch.no_grad(), unobserved(), _unchanged(model), as_it_is(model):
        look_again()
        for piece in pieces:
            output = model(input_ids=piece, **arguments)
            logits: torch.Tensor = output[0][:, -1:].squeeze(1)  # by index: field names change now and then
    return logits, list(cache.layers)


def _can_do_without_logits(model: torch.nn.Module) -> bool:
    """Returns whether a model may be asked for the logits of no token: its last step is a plain matrix product.

    With a large vocabulary, that step takes a quarter of a forward on few tokens.
    """
    if not is_from_transformers(model) or ranks_of(model) is not None:
        return False
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return type(head) is torch.nn.Linear and type(head.weight) is torch.nn.Parameter


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
