"""Finds out whether the KV of known chunks was edited. Edited KV is never saved, and never taken for known.

Two looks, since neither sees all. Version counters see each write of torch that is not hidden (`.data`, numpy). A sample of
each chunk sees hidden ones that change more than single numbers. Layers notice themselves when their tensors are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cake_hf.cache.layers import RecurrentLayer, TokenMajorLayer, WindowedLayer
from cake_hf.cache.layers.recurrent import states_of
from cake_hf.tensors.codec import checksum

STRIDE = 4
"""Of this many tokens one number is sampled in each layer, and one of each chunk's last token."""


class Seals:
    """Of one cache.

    Args:
        chunk_size: tokens.
    """

    def __init__(self, chunk_size: int) -> None:
        self._size = chunk_size
        self._samples: list[str] = []
        self._watched: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._broken = False

    def note(self, layers: Sequence[Any], chunks: int) -> None:
        """A forward of the model is through: what the layers hold is what it made, and so many chunks of it are known."""
        del self._samples[chunks:]
        if not chunks:
            return
        if new := range(len(self._samples), chunks):
            self._samples += _samples(layers, self._size, new)
        self._watched = [tensor for tensor in _tensors(layers) if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._watched]

    def look(self) -> None:
        """Before a forward of the model: see whether anything was written since the last one. Holds no tensors afterwards."""
        self._broken |= self._versions != [tensor._version for tensor in self._watched]
        self._watched, self._versions = [], []

    def hold(self, layers: Sequence[Any], chunks: int) -> bool:
        """Whether the first so many chunks, all of them known, are what the model made."""
        del self._samples[chunks:]
        if not all(getattr(layer, "is_own", True) for layer in layers):
            return False
        return not self._broken and self._samples == _samples(layers, self._size, range(len(self._samples)))

    def forget(self) -> None:
        """The cache is empty, or what it holds is not known any more."""
        self._samples, self._watched, self._versions, self._broken = [], [], [], False

    def copy(self, layers: Sequence[Any], copied: Sequence[Any]) -> Seals:
        """For a copy of the cache.

        Args:
            layers: of the cache.
            copied: of the copy, with the same content.
        """
        chunks = len(self._samples)
        self.look()
        self.note(layers, chunks)
        seals = Seals(self._size)
        seals._samples, seals._broken = list(self._samples), self._broken
        seals.note(copied, chunks)
        return seals


def _tensors(layers: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in layers:
        if isinstance(layer, RecurrentLayer):
            found += states_of(layer).values()
        if isinstance(layer, TokenMajorLayer) and layer.is_initialized:
            found += layer.buffers
        elif isinstance(layer, WindowedLayer) and layer.keys is not None:
            found += [layer.keys, layer.values]
    return found


def _samples(layers: Sequence[Any], size: int, chunks: range) -> list[str]:
    """A digest per chunk, of the same numbers wherever they lie in memory."""
    buffers = [
        buffer
        for layer in layers
        if isinstance(layer, TokenMajorLayer) and layer.is_initialized
        for buffer in layer.buffers
    ]
    buffers = [buffer for buffer in buffers if buffer.numel()]
    if not chunks or not buffers:
        return [""] * len(chunks)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for buffer in buffers:
        by_device.setdefault(buffer.device, []).append(_sampled(buffer, size, chunks).view(torch.uint8))
    rows = torch.cat([torch.cat(sampled, dim=1).cpu() for sampled in by_device.values()], dim=1).numpy()
    return [checksum(row.tobytes()) for row in rows]


def _sampled(buffer: torch.Tensor, size: int, chunks: range) -> torch.Tensor:
    """`[chunks, sampled tokens]`: of each token another head, and another number of it."""
    heads, head_dim = buffer.shape[2:]
    places = torch.tensor([*range(0, size, STRIDE), size - 1], device=buffer.device)
    tokens = (torch.arange(chunks.start, chunks.stop, device=buffer.device).unsqueeze(1) * size + places).flatten()
    number = tokens // STRIDE
    return buffer.detach()[0, tokens, number % heads, number * 7 % head_dim].view(len(chunks), len(places))
