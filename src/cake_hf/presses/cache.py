"""`PressedCache`: what a press returns, and what `generate` goes on with."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from cake_hf.errors import CakeError
from cake_hf.presses.attention import expect, watch
from cake_hf.presses.layers import PressedLayer


@dataclass(frozen=True)
class PressReport:
    """What a press did.

    Attributes:
        press: its name and options.
        tokens: of the prefix.
        entries: kept in each layer, the mean over its heads.
        bytes_before: of the prefix's keys and values.
        bytes_after: of all that is kept in their place.
        error: how far attention is from that on all KV; None if it was not measured. For the last queries of the prefix, the
            norm of the difference of the outputs over the norm of the right ones, the mean over all layers.
        seconds: that the press took, without measuring the error of attention.
    """

    press: str
    tokens: int
    entries: list[float]
    bytes_before: int
    bytes_after: int
    error: float | None
    seconds: float


class PressedCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed for us
    """A cache made by a press. It is never stored, and goes on with one prompt; copies (`copy.deepcopy`) are independent.

    Args:
        model: the model that it was made for.
        layers: one per layer of the model.
        report: what the press did.
    """

    def __init__(self, model: torch.nn.Module, layers: list[PressedLayer], report: PressReport | None = None) -> None:
        Cache.__init__(self, layers=layers)
        self.report = report or PressReport("", 0, [], 0, 0, None, 0.0)
        self._model = model
        watch(model, self)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the states of new tokens to a layer, and sends the attention that follows to it."""
        layer = self.layers[layer_idx]
        kept: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states)
        expect(layer, kept[0], first=layer_idx == 0)
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept now, with the tokens that came after the press."""
        return nbytes(tensor for layer in self.layers for tensor in layer.state())

    def __deepcopy__(self, memo: dict[int, Any]) -> PressedCache:
        return type(self)(self._model, copy.deepcopy(self.layers, memo), self.report)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: what a press drops cannot come back."""
        raise CakeError("A pressed cache cannot be cropped, reset or reordered; press the restored cache again.")

    reset = reorder_cache = batch_repeat_interleave = batch_select_indices = crop


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of tensors; a tensor that several layers share counts once."""
    found = {(tensor.data_ptr(), tensor.shape): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(found.values())
