"""Side runs, the package's own forwards, which belong to no prompt; and the layout of a model's KV, which one of them shows.

A side run determines a model's results and leaves no trace on it. A fixed short one (`probed_layers`) shows the layout of the
KV, once per model and mode, and the model's behaviour. No config entry gives the number and size of the kept heads for all
model families, and a wrong guess would cost a restore.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.layers.compat import (
    LinearAttentionLayer,
    forward_parameters,
    is_from_transformers,
    named_for,
    plain_cache,
)
from cake_hf.layers.kinds import windowed_layers
from cake_hf.layers.recurrent import states_of
from cake_hf.model.foreign_code import aside
from cake_hf.model.look import home_device, look_again, modules_of, once_per_look
from cake_hf.model.numerics import autocast_modes
from cake_hf.model.ranks import ranks_of
from cake_hf.model.vision import family_of
from cake_hf.util.forks import Lock

_GONE = object()
_one_at_a_time = Lock()


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
    cache.presses_rest = True
    accepted = forward_parameters(model)
    arguments: dict[str, Any] = {"use_cache": True, **named_for(model, cache)}
    if "logits_to_keep" in accepted:
        none = for_kv and _can_do_without_logits(model)
        arguments["logits_to_keep"] = torch.empty(0, dtype=torch.long) if none else 1
    if positions is not None and "position_ids" in accepted:
        arguments["position_ids"] = positions
    with _one_at_a_time, torch.no_grad(), aside(model), _unchanged(model):
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


TOKENS = 2
"""Tokens of the forward: the fewest that attend to one another. Half are far behind the others, where positions matter more."""
FARTHEST = 8192


@once_per_look
def probed_layers(model: torch.nn.Module) -> list[Any]:
    """Returns the layers of a `DynamicCache` that holds the KV that a model computes for `TOKENS` tokens.

    Within one look the model is run once: a first prompt needs the layout and then the behaviour.
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


@dataclass(frozen=True)
class Made:
    """The kind of KV that a model computes.

    Attributes:
        layers: the layers of a `DynamicCache` that holds `TOKENS` tokens.
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
    """Returns the kind of KV that a model currently computes."""
    mode = _mode(model)
    with _lock:
        known = _known.setdefault(model, {})
        if mode not in known:
            known[mode] = Made.of(probed_layers(model))
        return known[mode]


def kv_template(model: torch.nn.Module) -> list[Any]:
    """Returns the layers of a `DynamicCache` that holds `TOKENS` tokens, as the model currently creates them."""
    return made_by(model).layers


def probed(model: torch.nn.Module) -> tuple[list[Any], Made]:
    """Returns the layers that a model currently computes (`probed_layers`), and what kind of KV they hold.

    That is remembered for `made_by`. It differs from what was remembered before if the model has been changed.
    """
    layers, mode = probed_layers(model), _mode(model)
    with _lock:
        known = _known.setdefault(model, {})
        made = known.get(mode)
        if made is None or (made.token, made.states) != (chunk_layout(layers, 1), state_layout(layers)):
            made = known[mode] = Made.of(layers)
        return layers, made


def chunk_layout(layers: list[Any], chunk_size: int) -> ChunkLayout:
    """Returns the layout of a chunk of these layers' KV."""
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
    """Returns the layout of a snapshot of these layers' recurrent states, each as one "token"; without pieces if none."""
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
