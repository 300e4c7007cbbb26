"""The layout of a model's KV, determined by running a few tokens, once per model and mode.

No config entry gives the number and size of the kept heads for all model families, and a wrong guess would cost a restore.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.layers.compat import LinearAttentionLayer
from cake_hf.layers.kinds import windowed_layers
from cake_hf.layers.recurrent import states_of
from cake_hf.model.look import home_device, once_per_look
from cake_hf.model.numerics import autocast_modes
from cake_hf.model.side_run import TOKENS, probed_layers
from cake_hf.util.forks import Lock


@dataclass(frozen=True)
class Made:
    """The kind of KV that a model computes.

    Attributes:
        layers: of a `DynamicCache` that holds `probe.TOKENS` tokens.
        token: the layout of one token's KV.
        states: the layout of a snapshot of the recurrent states; without pieces if there are none.
    """

    layers: list[Any]
    token: ChunkLayout
    states: ChunkLayout
    _chunks: dict[int, ChunkLayout] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, layers: list[Any]) -> Made:
        """Reads the layouts from layers that hold one or more tokens."""
        return cls(layers, chunk_layout(layers, 1), state_layout(layers))

    def chunk(self, chunk_size: int) -> ChunkLayout:
        """Returns the layout of a chunk; the same object each time, so that its computed properties are reused."""
        if chunk_size not in self._chunks:
            self._chunks[chunk_size] = self.token.of(chunk_size)
        return self._chunks[chunk_size]


_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[object, Made]] = weakref.WeakKeyDictionary()
_lock = Lock()


@once_per_look
def made_by(model: torch.nn.Module) -> Made:
    """Returns the kind of KV that a model currently computes.

    Args:
        model: of a kind whose layers are known.
    """
    mode = _mode(model)
    with _lock:
        known = _known.setdefault(model, {})
        if mode not in known:
            known[mode] = Made.of(probed_layers(model))
        return known[mode]


def kv_template(model: torch.nn.Module) -> list[Any]:
    """Returns the layers of a `DynamicCache` that holds `probe.TOKENS` tokens, as the model currently creates them."""
    return made_by(model).layers


def forget_if_unlike(model: torch.nn.Module, layers: list[Any]) -> None:
    """Forgets the remembered layout if layers that the model has just computed differ from it: the model has been changed."""
    mode = _mode(model)
    with _lock:
        known = _known.get(model, {})
        if mode in known and (known[mode].token, known[mode].states) != (chunk_layout(layers, 1), state_layout(layers)):
            del known[mode]


def chunk_layout(layers: list[Any], chunk_size: int) -> ChunkLayout:
    """Returns the layout of a chunk of these layers' KV.

    Args:
        layers: from `kv_template`.
        chunk_size: in tokens.
    """
    windowed = windowed_layers(layers)
    pieces = [
        Piece(
            f"layers.{number}.{what}",
            tensor.shape[1],
            tensor.shape[3],
            tensor.dtype,
            number,
            windowed=number in windowed,
        )
        for number, layer in enumerate(layers)
        for what, tensor in _kept_per_token(layer).items()
    ]
    return ChunkLayout(chunk_size, tuple(sorted(pieces, key=lambda piece: piece.windowed)))


def state_layout(layers: list[Any]) -> ChunkLayout:
    """Returns the layout of a snapshot of these layers' recurrent states, each as one "token"; without pieces if none.

    Args:
        layers: from `kv_template`.
    """
    pieces = [
        Piece(f"layers.{number}.{what}", state.numel() // state.shape[-1], state.shape[-1], state.dtype, number)
        for number, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionLayer)
        for what, state in states_of(layer).items()
    ]
    # The widest dtypes first, so that each piece is aligned to its own.
    return ChunkLayout(1, tuple(sorted(pieces, key=lambda piece: -piece.dtype.itemsize)))


def layers_with_tokens(layers: list[Any]) -> list[int]:
    """Returns the numbers of the layers from `kv_template` that keep something per token, even if only for the last tokens."""
    return [number for number, layer in enumerate(layers) if _kept_per_token(layer)]


def keep_each_token_once(layers: list[Any]) -> bool:
    """Returns whether each layer from `kv_template` holds each token once, except those before a window, or keeps none."""
    windowed = windowed_layers(layers)
    kept = [
        (number, tensor.shape[2]) for number, layer in enumerate(layers) for tensor in _kept_per_token(layer).values()
    ]
    return all(tokens == TOKENS or (tokens < TOKENS and number in windowed) for number, tokens in kept)


def _mode(model: torch.nn.Module) -> object:
    """Returns everything besides the model on which the layout may depend."""
    device = home_device(model)
    placed = str(getattr(model, "hf_device_map", ""))
    autocast = autocast_modes(sorted({"cpu", "cuda", device.type}))
    return next(model.parameters()).dtype, device, placed, autocast


def _kept_per_token(layer: Any) -> dict[str, torch.Tensor]:
    """Returns a layer's tensors `[1, heads, tokens, head_dim]` by name, in payload order."""
    if getattr(layer, "keys", None) is None:  # a layer that uses another layer's KV, or has only a state
        return {}
    kept = {"keys": layer.keys, "values": layer.values}
    if getattr(layer, "indexer_keys", None) is not None:
        kept["indexer_keys"] = layer.indexer_keys.unsqueeze(1)
    return kept
