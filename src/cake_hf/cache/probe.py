"""What KV a model makes: found out by running one token, once per model and mode.

No config says for all model families how many heads of which size are kept, and a wrong guess would be a lost restore.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from cake_hf.arithmetic.forks import Lock
from cake_hf.cache.compat import LinearAttentionLayer, named_for, plain_cache
from cake_hf.cache.layers import WindowedLayer, ours_for
from cake_hf.cache.layers.recurrent import states_of
from cake_hf.cache.presses import Presses
from cake_hf.tensors.layout import ChunkLayout, Piece
from cake_hf.tensors.numerics import autocast_facts
from cake_hf.tensors.offload import home_device

STATE_TOLERANCE = 0.05
STATE_TOLERANCE_FLOAT32 = 0.01  # TF32 counts as well
LOGITS_TOLERANCE = 0.2
"""Relative differences between a prompt in one piece and in two: far above rounding, far below what a lost state does."""

_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[object, list[Any]]] = weakref.WeakKeyDictionary()
_different: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
_forgetful: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
_lock = Lock()


def kv_like(model: torch.nn.Module) -> list[Any]:
    """The layers of a `DynamicCache` that holds one token, as the model makes them at present.

    Args:
        model: of a kind whose layers we know.
    """
    device = home_device(model)
    placed = str(getattr(model, "hf_device_map", ""))
    autocast = tuple(autocast_facts(kind) for kind in sorted({"cpu", "cuda", device.type}))
    mode = (next(model.parameters()).dtype, device, placed, autocast)
    with _lock:
        known = _known.setdefault(model, {})
        if mode not in known:
            known[mode] = _run_one_token(model, device)
        return known[mode]


def chunk_layout(layers: list[Any], chunk_size: int) -> ChunkLayout:
    """The layout of a chunk of these layers' KV.

    Args:
        layers: from `kv_like`.
        chunk_size: tokens.
    """
    pieces = [
        Piece(
            f"layers.{number}.{what}",
            tensor.shape[1],
            tensor.shape[3],
            tensor.dtype,
            number,
            windowed=isinstance(ours_for(layer), WindowedLayer),
        )
        for number, layer in enumerate(layers)
        for what, tensor in _kept_per_token(layer).items()
    ]
    return ChunkLayout(chunk_size, tuple(sorted(pieces, key=lambda piece: piece.windowed)))


def state_layout(layers: list[Any]) -> ChunkLayout:
    """The layout of a snapshot of these layers' recurrent states: each as one "token" of it; no pieces where there are none.

    Args:
        layers: from `kv_like`.
    """
    pieces = [
        Piece(f"layers.{number}.{what}", state.numel() // state.shape[-1], state.shape[-1], state.dtype, number)
        for number, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionLayer)
        for what, state in states_of(layer).items()
    ]
    # The widest dtypes first, so that each piece is aligned to its own.
    return ChunkLayout(1, tuple(sorted(pieces, key=lambda piece: -piece.dtype.itemsize)))


def keeps_tokens(layer: Any) -> bool:
    """Whether a layer from `kv_like` keeps something of each token, be it only of the last ones."""
    return bool(_kept_per_token(layer))


def forgets(model: torch.nn.Module) -> bool:
    """Whether a model with recurrent states loses them where a prompt is cut, found out once by cutting one.

    Some models of transformers begin anew in every forward of more than one token. In pieces, they would give other results
    than in one, whatever the cache.
    """
    with _lock:
        if model not in _forgetful:
            _forgetful[model] = _loses_state(model)
        return _forgetful[model]


def keeps_each_token_once(layer: Any) -> bool:
    """Whether a layer from `kv_like`, after one token, holds one token, or keeps none."""
    return all(tensor.shape[2] == 1 for tensor in _kept_per_token(layer).values())


def differs_in_pieces(model: torch.nn.Module) -> bool:
    """Whether a model's logits for a short prompt in two pieces are others than in one, by more than rounding; tried once."""
    with _lock:
        if model not in _different:
            (whole, _), (cut, _) = _whole_and_cut(model)
            _different[model] = _differ(whole, cut, LOGITS_TOLERANCE)
        return _different[model]


def _whole_and_cut(model: Any) -> tuple[tuple[torch.Tensor, list[Any]], tuple[torch.Tensor, list[Any]]]:
    """What `_run` gives for a short prompt in one piece and in two."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(18, device=home_device(model)) * 7 % min(61, vocabulary)).unsqueeze(0)
    return _run(model, [ids]), _run(model, [ids[:, :16], ids[:, 16:]])


def _loses_state(model: Any) -> bool:
    embeddings = model.get_input_embeddings().weight
    whole, cut = _whole_and_cut(model)
    # Of the first such layer, whose input is the same in both, so that it shows no other difference.
    first = next(n for n, layer in enumerate(whole[1]) if isinstance(layer, LinearAttentionLayer))
    states = [states_of(layers[first]) for _, layers in (whole, cut)]
    recurrent = [name for name in states[0] if name.startswith("recurrent")]
    if not recurrent:  # a short convolution: its loss shows in what comes after it only
        return _differ(whole[0], cut[0], LOGITS_TOLERANCE)
    tolerance = STATE_TOLERANCE_FLOAT32 if embeddings.dtype == torch.float32 else STATE_TOLERANCE
    return any(_differ(states[0][name], states[1][name], tolerance) for name in recurrent)


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    one, other = one.float(), other.float()
    return not bool((one - other).norm() <= tolerance * one.norm())


def _run(model: torch.nn.Module, pieces: list[torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
    """The last logits, and the layers after these pieces of a prompt."""
    cache = plain_cache(model)
    Presses.on(model)
    cache.presses_rest = True
    with torch.no_grad():
        for piece in pieces:
            output = model(input_ids=piece, use_cache=True, **named_for(model, cache))
            logits: torch.Tensor = output[0][:, -1]  # by place: fields are renamed now and then
    return logits, list(cache.layers)


def _kept_per_token(layer: Any) -> dict[str, torch.Tensor]:
    """A layer's tensors `[1, heads, 1, head_dim]` by name, in payload order."""
    if getattr(layer, "keys", None) is None:  # a layer that uses another one's KV, or only has a state
        return {}
    kept = {"keys": layer.keys, "values": layer.values}
    if getattr(layer, "indexer_keys", None) is not None:
        kept["indexer_keys"] = layer.indexer_keys.unsqueeze(1)
    return kept


def _run_one_token(model: torch.nn.Module, device: torch.device) -> list[Any]:
    return _run(model, [torch.zeros((1, 1), dtype=torch.long, device=device)])[1]
