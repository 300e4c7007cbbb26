"""Which of our layers stands in for which of transformers'."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cake_hf.cache.compat import (
    DummyLayer,
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    has_numbered_states,
)
from cake_hf.cache.layers.indexed import IndexedLayer
from cake_hf.cache.layers.recurrent import HybridLayer, RecurrentLayer
from cake_hf.cache.layers.token_major import TokenMajorLayer
from cake_hf.cache.layers.windowed import WindowedLayer

OURS = (TokenMajorLayer, WindowedLayer, RecurrentLayer, DummyLayer)
"""What can be restored; a dummy keeps nothing."""


def ours_for(layer: Any) -> Any:
    """Our layer in place of one of transformers'; the same one where it keeps nothing, or we do not know what it keeps."""
    # By the exact type: a class derived from these may keep something else besides.
    if type(layer) is DynamicLayer:
        return TokenMajorLayer()
    if type(layer) is DynamicIndexedLayer:
        return IndexedLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowedLayer(layer.sliding_window)
    if type(layer) is LinearAttentionLayer and has_numbered_states(layer):
        return RecurrentLayer(layer.number_of_states)
    if type(layer) is LinearAttentionAndFullAttentionLayer and has_numbered_states(layer):
        return HybridLayer(layer.number_of_states)
    return layer


def is_ours(layer: Any) -> bool:
    """Whether we know what a layer keeps."""
    return isinstance(layer, OURS)
