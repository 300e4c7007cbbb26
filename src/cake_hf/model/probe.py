"""A fixed short forward, which shows what a model currently computes: the layout of its KV, and its behaviour."""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.model.look import once_per_look
from cake_hf.model.side_run import run_aside, some_tokens
from cake_hf.model.vision import family_of

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
    return run_aside(model, [ids], positions=_positions(model, ids.device), for_kv=True)[1]


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
