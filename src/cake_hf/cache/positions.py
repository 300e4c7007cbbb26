"""What layers hold at one place of a prompt, so that they can be put there again while later tokens are in their buffers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cake_hf.layers import RecurrentLayer, SlidingWindowLayer, TokenMajorLayer
from cake_hf.layers.recurrent import states_of
from cake_hf.layers.sliding_window import Content
from cake_hf.restore.held import Held


@dataclass(frozen=True)
class Position:
    """The content of a cache's layers at one place.

    Attributes:
        tokens: before that place.
        held: what is known of them.
        windows: what windowed layers hold there, by number. These tensors are not written to.
        states: of recurrent layers, by number; copies.
    """

    tokens: int
    held: Held
    windows: dict[int, Content]
    states: dict[int, dict[str, torch.Tensor]]

    @classmethod
    def take(cls, layers: Sequence[Any], tokens: int, held: Held) -> Position:
        """Where the layers stand now."""
        windows = {n: layer.content for n, layer in enumerate(layers) if isinstance(layer, SlidingWindowLayer)}
        states = {
            n: {name: state.clone() for name, state in states_of(layer).items()}
            for n, layer in enumerate(layers)
            if isinstance(layer, RecurrentLayer)
        }
        return cls(tokens, held.copy(), windows, states)

    def put(self, layers: Sequence[Any], template: Sequence[Any]) -> None:
        """Have the layers stand there; what they keep of each token up to that place is in their buffers.

        Args:
            layers: of the cache.
            template: the same layers with one token in them.
        """
        for number, layer in enumerate(layers):
            if isinstance(layer, SlidingWindowLayer):
                layer.put(self.windows[number])
            if isinstance(layer, RecurrentLayer):
                layer.put_states(self.states[number], template[number])
        show_tokens(layers, self.tokens)


@dataclass(frozen=True)
class Ahead:
    """The end of a document, which the cache has, and does not show before a prompt comes that goes on from it.

    Attributes:
        ids: `[1, tokens]`, on the host: of the document's last piece.
        end: where the layers stand with it.
    """

    ids: torch.Tensor
    end: Position

    @property
    def tokens(self) -> int:
        """Of the piece."""
        return int(self.ids.shape[1])

    def begins(self, ids: torch.Tensor) -> bool:
        """Whether what is new of a prompt, `[1, tokens]`, goes on from the document's end."""
        return ids.shape[0] == 1 and ids.shape[1] > self.tokens and torch.equal(ids[:, : self.tokens].cpu(), self.ids)


def show_tokens(layers: Sequence[Any], tokens: int) -> None:
    """Have the layers that keep each token show so many of their buffers."""
    for layer in layers:
        if isinstance(layer, TokenMajorLayer) and layer.is_initialized:
            layer.show(tokens)


def copied_layers(layers: Sequence[Any], ahead: Ahead | None, memo: dict[int, Any]) -> list[Any]:
    """Copies of a cache's layers, which have the end of the document, too, and show as much as these do.

    Args:
        layers: of the cache. They are read only, so that several threads may each copy a document that all of them ask about.
        ahead: the end of the document that they do not show.
        memo: of `copy.deepcopy`.
    """
    if ahead is None:
        return copy.deepcopy(list(layers), memo)
    end = ahead.end.tokens
    copied = [
        layer.copied(memo, end) if isinstance(layer, TokenMajorLayer) else copy.deepcopy(layer, memo)
        for layer in layers
    ]
    show_tokens(copied, end - ahead.tokens)
    return copied
