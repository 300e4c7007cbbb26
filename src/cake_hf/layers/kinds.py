"""The mapping from transformers' cache layers to this package's layers that replace them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cake_hf.layers.compat import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    has_numbered_states,
)
from cake_hf.layers.indexed import IndexedLayer
from cake_hf.layers.recurrent import OF_STATES, HybridLayer, RecurrentLayer
from cake_hf.layers.sliding_window import SlidingWindowLayer
from cake_hf.layers.token_major import TokenMajorLayer

OURS = (TokenMajorLayer, SlidingWindowLayer, RecurrentLayer, DummyLayer)
"""Layers that can be restored; a `DummyLayer` keeps nothing."""


def ours_for(layer: Any) -> Any:
    """Returns our replacement for a transformers layer; the layer itself if it keeps nothing or its content is unknown."""
    # By the exact type: a subclass may keep something else as well.
    if type(layer) is DynamicLayer:
        return TokenMajorLayer()
    if type(layer) is DynamicIndexedLayer:
        return IndexedLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        return SlidingWindowLayer(layer.sliding_window)
    if type(layer) is LinearAttentionLayer and has_numbered_states(layer):
        return RecurrentLayer(layer.number_of_states)
    if type(layer) is LinearAttentionAndFullAttentionLayer and has_numbered_states(layer):
        return HybridLayer(layer.number_of_states)
    return layer


def is_windowed(layer: Any) -> bool:
    """Returns whether a layer, of transformers or of this package, is a sliding-window layer."""
    return type(layer) is DynamicSlidingWindowLayer or isinstance(layer, SlidingWindowLayer)


def windowed_layers(layers: Iterable[Any]) -> set[int]:
    """Returns the numbers of the layers that keep only their last tokens."""
    return {number for number, layer in enumerate(layers) if is_windowed(layer)}


def check_stand_in(theirs: Any, ours: Any) -> None:
    """Checks that a new transformers layer and its replacement behave alike, by updating both with the same tokens.

    The check takes a fraction of a millisecond. It detects a version of transformers whose layers differ from the known ones.

    Args:
        theirs: an empty layer; not usable afterwards.
        ours: an empty layer; may be the same object.

    Raises:
        Exception: `ours` cannot replace `theirs`.
    """
    if isinstance(ours, RecurrentLayer):
        for name in OF_STATES:
            getattr(theirs, name)
    if ours is theirs or not isinstance(ours, (TokenMajorLayer, SlidingWindowLayer)):
        return
    with torch.inference_mode(False), torch.no_grad():
        for tokens in (3, 1):
            states = torch.arange(8.0 * tokens, device="cpu").view(1, 2, tokens, 4)
            shown = [layer.update(states, states + 1) for layer in (ours, theirs)]
            kept = [(layer.keys, layer.values) for layer in (ours, theirs)]
            for one, other in (shown, kept):
                if len(one) != len(other) or not all(map(torch.equal, one, other)):
                    raise TypeError("a cache's layers show, or keep, other tensors than we know")
            counted = [getattr(layer, "cumulative_length", 0) for layer in (ours, theirs)]
            if ours.get_seq_length() != theirs.get_seq_length() or counted[0] != counted[1]:
                raise TypeError("a cache's layers count other tokens than we know")


def is_ours(layer: Any) -> bool:
    """Returns whether a layer's content is known to this package."""
    return isinstance(layer, OURS)
