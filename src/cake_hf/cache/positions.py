"""The content of layers at one place of a prompt, which can be put back while later tokens stay in their buffers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cake_hf.blocks import HeldBlocks
from cake_hf.layers import RecurrentLayer, SlidingWindowLayer, TokenMajorLayer
from cake_hf.layers.recurrent import states_of
from cake_hf.layers.sliding_window import Content


@dataclass(frozen=True)
class Position:
    """The content of a cache's layers at one place of a prompt.

    Attributes:
        tokens: before that place.
        held: what is known of these tokens.
        windows: what sliding-window layers hold there, by layer number. These tensors are not written to.
        states: copies of the recurrent layers' states, by layer number.
    """

    tokens: int
    held: HeldBlocks
    windows: dict[int, Content]
    states: dict[int, dict[str, torch.Tensor]]

    @classmethod
    def take(cls, layers: Sequence[Any], tokens: int, held: HeldBlocks) -> Position:
        """Records where the layers stand now."""
        windows = {n: layer.content for n, layer in enumerate(layers) if isinstance(layer, SlidingWindowLayer)}
        states = {
            n: {name: state.clone() for name, state in states_of(layer).items()}
            for n, layer in enumerate(layers)
            if isinstance(layer, RecurrentLayer)
        }
        return cls(tokens, held.copy(), windows, states)

    def put(self, layers: Sequence[Any], template: Sequence[Any]) -> None:
        """Puts the layers back to that place; the KV of each token up to there must still be in their buffers."""
        for number, layer in enumerate(layers):
            if isinstance(layer, SlidingWindowLayer):
                layer.put(self.windows[number])
            if isinstance(layer, RecurrentLayer):
                layer.put_states(self.states[number], template[number])
        show_tokens(layers, self.tokens)


@dataclass(frozen=True)
class HiddenBlock:
    """The end of a document, which the cache holds but does not show until a prompt comes that continues from it.

    Attributes:
        ids: `[1, tokens]`, on the host: the document's last tokens, which are not shown.
        end: where the layers stand after these tokens.
    """

    ids: torch.Tensor
    end: Position

    @property
    def tokens(self) -> int:
        """The number of tokens that are not shown."""
        return int(self.ids.shape[1])

    def begins(self, ids: torch.Tensor) -> bool:
        """Returns whether the new part of a prompt, `[1, tokens]`, starts with these tokens and continues after them."""
        return ids.shape[0] == 1 and ids.shape[1] > self.tokens and torch.equal(ids[:, : self.tokens].cpu(), self.ids)


def can_be_shortened(layers: Sequence[Any]) -> bool:
    """Returns whether layers hold, for each place, what they held there: each token, and neither windows nor states."""
    return not any(isinstance(layer, (SlidingWindowLayer, RecurrentLayer)) for layer in layers)


def show_tokens(layers: Sequence[Any], tokens: int) -> None:
    """Has the layers that keep each token show the first `tokens` of their buffers."""
    for layer in layers:
        if isinstance(layer, TokenMajorLayer) and layer.is_initialized:
            layer.show(tokens)


def copied_layers(layers: Sequence[Any], hidden: HiddenBlock | None, memo: dict[int, Any]) -> list[Any]:
    """Copies a cache's layers, including the end of a document, and has the copies show as much as the originals do.

    Args:
        layers: of the cache. They are only read, so several threads may each copy a document that all of them ask about.
        hidden: the end of the document that they do not show.
        memo: of `copy.deepcopy`.
    """
    if hidden is None:
        return copy.deepcopy(list(layers), memo)
    end = hidden.end.tokens
    copied = [
        layer.copied(memo, end) if isinstance(layer, TokenMajorLayer) else copy.deepcopy(layer, memo)
        for layer in layers
    ]
    show_tokens(copied, end - hidden.tokens)
    return copied
