"""The queries of a prefix's last tokens, which a restore does not bring: those tokens run once more, on what came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cake_hf.errors import CakeError
from cake_hf.layers.compat import named_for
from cake_hf.presses.attention import Attended, Attention, AttentionCall
from cake_hf.presses.cache import PressedCache
from cake_hf.presses.layers import PressedLayer

TOLERANCE = 0.05
"""Relative difference of a token's states that rounding may make."""


@dataclass(frozen=True)
class Recorded:
    """What one layer did with the window.

    Attributes:
        queries: `[1, heads, window, head_dim]`, with their positions.
        attention: the model's function for them.
    """

    queries: torch.Tensor
    attention: Attention

    def scores(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns the attention weights `[heads, window, tokens]`, float32, of the window's queries: each row sums to 1.

        Args:
            keys: `[1, heads, tokens, head_dim]` of the whole prefix, which ends with the window.
        """
        groups = self.queries.shape[1] // keys.shape[1]
        products = self.queries[0].float() @ keys[0].float().repeat_interleave(groups, dim=0).transpose(-1, -2)
        window, tokens = products.shape[-2:]
        hidden = torch.ones(window, tokens, dtype=torch.bool, device=keys.device).triu(tokens - window + 1)
        return (products * self.attention.scaling).masked_fill(hidden, float("-inf")).softmax(dim=-1)

    def by_head(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns `scores`, summed over the queries and those of a key's group: `[key heads, tokens]`."""
        summed: torch.Tensor = self.scores(keys).sum(dim=1).unflatten(0, (keys.shape[1], -1)).sum(dim=1)
        return summed


class _Recording(PressedLayer):
    """A layer that keeps everything and notes the queries that it sees."""

    recorded: Recorded

    def attend(self, call: AttentionCall) -> Attended:
        self.recorded = Recorded(call.query, call.attention)
        return super().attend(call)


def record(
    model: Any, keys: list[torch.Tensor], values: list[torch.Tensor], ids: torch.Tensor, window: int
) -> list[Recorded]:
    """Runs the last tokens of a prefix again; returns what each layer did.

    Args:
        model: the model.
        keys, values: of each layer, for the whole prefix; not changed.
        ids: `[1, tokens]` of the prefix.
        window: how many tokens; fewer if there are not as many.

    Raises:
        CakeError: the tokens get other keys than they have. Those of the first layer depend on token and position alone, so the
            ids are wrong, or the positions (a model that numbers tokens by images keeps the numbering of its last prompt).
    """
    before = max(0, ids.shape[1] - window)
    layers = [
        _Recording(key[:, :, :before], value[:, :, :before], before) for key, value in zip(keys, values, strict=True)
    ]
    cache = PressedCache(model, list(layers))
    with torch.no_grad():
        ids = ids.to(keys[0].device)
        model(ids[:, before:], **named_for(model, cache))
    if not same_states(layers[0].keys[:, :, before:], keys[0][:, :, before:]):
        raise CakeError(
            "The last tokens have other keys now than in the cache: the ids are others, or the model numbers tokens otherwise."
        )
    return [layer.recorded for layer in layers]


def same_states(again: torch.Tensor, stored: torch.Tensor) -> bool:
    """Returns whether states `[1, heads, tokens, head_dim]` are the same but for rounding, those of each token.

    In the first layer they depend on a token and its position alone, so there they tell other tokens and positions.
    """
    norms, differences = (
        states.float().transpose(1, 2).flatten(2).norm(dim=-1) for states in (stored, again.float() - stored.float())
    )
    return bool((differences <= TOLERANCE * norms.clamp_min(float(norms.mean()))).all())
