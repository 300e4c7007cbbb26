"""Which of our layers stands in for which of transformers'."""

from __future__ import annotations

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
"""What can be restored; a dummy keeps nothing."""


def ours_for(layer: Any) -> Any:
    """Our layer in place of one of transformers'; the same one where it keeps nothing, or we do not know what it keeps."""
    # By the exact type: a class derived from these may keep something else besides.
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
    """Whether ours for one of transformers' layers, or of ours, keeps a window."""
    return type(layer) is DynamicSlidingWindowLayer or isinstance(layer, SlidingWindowLayer)


def check_stand_in(theirs: Any, ours: Any) -> None:
    """Bring some tokens into a new layer of transformers and ours in its place: both have to say the same of them.

    It takes a fraction of a millisecond, and finds out where a version of transformers has other layers than we know.

    Args:
        theirs: empty. It is of no use afterwards.
        ours: as well; may be the same one.

    Raises:
        Exception: ours is no stand-in.
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
    """Whether we know what a layer keeps."""
    return isinstance(layer, OURS)
