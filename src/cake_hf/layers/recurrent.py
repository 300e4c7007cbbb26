"""Layers whose memory is a state of fixed size: linear attention, state-space models, short convolutions."""

from __future__ import annotations

import copy
from typing import Any

import torch

from cake_hf.layers.compat import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer, counting_writes
from cake_hf.layers.token_major import TokenMajorLayer

OF_STATES = (
    "number_of_states", "conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized",
    "has_previous_state", "conv_kernel_size", "device", "dtype", "record_past",
)  # fmt: skip
"""Attributes that a layer has for its states, whether or not it holds any."""


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]  # transformers is not typed for us
    """A `LinearAttentionLayer` whose states can be read and replaced."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        with counting_writes():
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Drops the states, which transformers keeps as zeros: the next prompt may have another number of rows."""
        for name in ("conv_states", "recurrent_states"):
            for index in getattr(self, name):
                getattr(self, name)[index], getattr(self, f"is_{name}_initialized")[index] = None, False
        LinearAttentionLayer.reset(self)

    def put_states(self, states: dict[str, torch.Tensor], template: LinearAttentionLayer) -> None:
        """Replaces the layer's states with copies of these.

        Args:
            states: by the names of `states_of`, on any device; empty for the state before a prompt's first token.
            template: a layer of the same kind that holds states; gives their shapes and devices.
        """
        RecurrentLayer.reset(self)
        if not states:
            return
        for name, index, state in _states(template):
            which = name.split("_")[0]  # conv or recurrent
            with torch.inference_mode(False), torch.no_grad():
                LinearAttentionLayer.lazy_initialization(self, **{name: state}, state_idx=index)
            with torch.inference_mode():  # tensors created in inference mode cannot be written to outside it
                getattr(self, name)[index].copy_(states[f"{which}.{index}"])
            self.has_previous_state[index] = True


class HybridLayer(RecurrentLayer, LinearAttentionAndFullAttentionLayer, TokenMajorLayer):  # type: ignore[misc]  # untyped base
    """A `LinearAttentionAndFullAttentionLayer` whose attention part is token-major."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        TokenMajorLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # As in transformers: attention passes two positional arguments, the other parts pass named ones.
        (TokenMajorLayer if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        RecurrentLayer.reset(self)
        TokenMajorLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        TokenMajorLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        TokenMajorLayer.crop(self, tokens_to_remove)

    def copied(self, memo: dict[int, Any], tokens: int | None = None) -> HybridLayer:
        copied: HybridLayer = TokenMajorLayer.copied(self, memo, tokens)
        for name in OF_STATES:
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied


def states_of(layer: Any) -> dict[str, torch.Tensor]:
    """Returns a recurrent layer's states by name: "conv.0", "recurrent.0", ... Empty before the layer's first token."""
    return {f"{name.split('_')[0]}.{index}": state for name, index, state in _states(layer)}


def _states(layer: Any) -> list[tuple[str, int, torch.Tensor]]:
    return [
        (name, index, getattr(layer, name)[index])
        for index in range(layer.number_of_states)
        for name in ("conv_states", "recurrent_states")
        if layer.has_previous_state[index] and getattr(layer, f"is_{name}_initialized")[index]
    ]
