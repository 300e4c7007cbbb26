"""Converts a restored prompt to transformers' other caches.

The result is a copy: a change to either cache does not affect the other.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

from cake_hf.errors import CakeError
from cake_hf.layers import TokenMajorLayer
from cake_hf.layers.compat import DynamicLayer


def to_dynamic(cache: Cache, config: Any) -> DynamicCache:
    """Returns a `DynamicCache` with the same content; see `CakeCache.to_dynamic_cache`."""
    dynamic = DynamicCache(config=config)
    dynamic.layers = [_plain_layer(layer) for layer in cache.layers]
    return dynamic


def to_static(cache: Cache, config: Any, max_cache_len: int, into: StaticCache | None) -> StaticCache:
    """Returns a `StaticCache` with the same content; see `CakeCache.to_static_cache`."""
    _require_full_attention(cache, "a StaticCache")
    tokens = cache.get_seq_length()
    static = StaticCache(config=config, max_cache_len=max_cache_len) if into is None else into
    room = min(layer.max_cache_len for layer in static.layers)
    if tokens >= room:
        raise ValueError(f"The cache holds {tokens} tokens, and there is room for {room}; give a larger max_cache_len.")
    rows = [states.shape[0] for states in (cache.layers[0].keys,) if states is not None]
    made_for = static.layers[0].keys.shape[0] if static.layers[0].is_initialized else 0
    if made_for and rows not in ([], [made_for]):
        raise ValueError(
            f"The cache has {rows[0]} rows, the one to fill again was made for {made_for}; leave out `into`."
        )
    static.reset()
    return _refilled(static, cache)


def to_quantized(cache: Cache, config: Any, backend: str, options: dict[str, Any]) -> QuantizedCache:
    """Returns a `QuantizedCache` with the same content, quantized; see `CakeCache.to_quantized_cache`."""
    _require_full_attention(cache, "a QuantizedCache")
    return _refilled(QuantizedCache(backend, config, **options), cache)


def _refilled(target: Any, cache: Cache) -> Any:
    for number, layer in enumerate(cache.layers):
        if layer.get_seq_length():
            target.update(layer.keys, layer.values, number)
    return target


def _plain_layer(layer: Any) -> Any:
    """Copies a layer, as the type that `DynamicCache` has for it, or as one of our own types that behaves the same."""
    if type(layer) is not TokenMajorLayer:
        return copy.deepcopy(layer)
    plain = DynamicLayer()
    if layer.get_seq_length():
        plain.lazy_initialization(layer.keys, layer.values)
        plain.keys, plain.values = (
            states.clone(memory_format=torch.contiguous_format) for states in (layer.keys, layer.values)
        )
    return plain


def _require_full_attention(cache: Cache, target: str) -> None:
    other = sorted(
        {type(layer).__name__ for layer in cache.layers if type(layer) not in (TokenMajorLayer, DynamicLayer)}
    )
    if other:
        raise CakeError(
            f"{', '.join(other)} cannot be handed over to {target}, only layers with full attention; use to_dynamic_cache()."
        )
