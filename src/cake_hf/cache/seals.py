"""A cache's record of its content: the prompt tokens, and seals by which it detects that the KV of known chunks was edited.

Edited KV is never saved, and never treated as known. There are two checks for it, since neither sees everything. Version
counters catch each write by torch that is not hidden (`.data`, numpy). A sample of each chunk catches hidden writes that change
more than single numbers. Layers themselves notice when their tensors are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any

import torch

from cake_hf.blocks import Block
from cake_hf.chunks.codec import checksums_between
from cake_hf.errors import CakeError
from cake_hf.layers import RecurrentLayer, SlidingWindowLayer, TokenMajorLayer
from cake_hf.layers.recurrent import states_of

STRIDE = 4
"""In each layer one number is sampled per this many tokens, and one of each block's last token."""
MOST_PLACES = 256
"""As many numbers are sampled of a window, or of a state, at most."""


class Seals:
    """The seals on the known blocks of one cache."""

    def __init__(self) -> None:
        self._samples: list[str] = []
        self._watched: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._moving: list[torch.Tensor] = []
        self._moving_sample = b""
        self._broken = False

    def note(self, layers: Sequence[Any], blocks: Sequence[Block], *, decoding: bool = False) -> None:
        """Seals the known blocks after a forward of the model: what the layers hold is what the model made.

        Args:
            layers: of the cache.
            blocks: the known ones.
            decoding: windows and states are sampled only if there are new blocks: each token changes them.
        """
        del self._samples[len(blocks) :]
        if not blocks:
            return
        buffers = _buffers(layers)
        if new := blocks[len(self._samples) :]:
            self._samples += _samples(buffers, new)
        others = _others(layers)
        if new or not decoding:
            self._moving = [tensor for tensor in others if tensor.numel()]
            self._moving_sample = _sample_of(self._moving)
        self._watched = [tensor for tensor in (*buffers, *others) if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._watched]

    def look(self) -> None:
        """Checks, before a forward of the model, for writes since the last one. Holds no tensors afterwards."""
        self._broken |= self._versions != [tensor._version for tensor in self._watched]
        self._broken |= self._moving_sample != _sample_of(self._moving)
        self._let_go()

    def hold(self, layers: Sequence[Any], blocks: Sequence[Block]) -> bool:
        """Returns whether these blocks, all of them known, are still what the model made."""
        del self._samples[len(blocks) :]
        if not all(getattr(layer, "is_own", True) for layer in layers):
            return False
        return not self._broken and self._samples == _samples(_buffers(layers), blocks[: len(self._samples)])

    def forget(self) -> None:
        """Removes all seals: the cache is empty, or its content is no longer known."""
        self._samples, self._broken = [], False
        self._let_go()

    def _let_go(self) -> None:
        self._watched, self._versions = [], []
        self._moving, self._moving_sample = [], b""

    def copy(self, layers: Sequence[Any], copied: Sequence[Any], blocks: Sequence[Block]) -> Seals:
        """Returns the seals for a copy of the cache.

        Args:
            copied: of the copy, with the same content.
            blocks: the known blocks.
        """
        sealed = blocks[: len(self._samples)]
        self.look()
        self.note(layers, sealed)
        seals = Seals()
        seals._samples, seals._broken = list(self._samples), self._broken
        seals.note(copied, sealed)
        return seals


def _buffers(layers: Sequence[Any]) -> list[torch.Tensor]:
    """Returns the buffers of all layers that keep each token."""
    kept = [layer for layer in layers if isinstance(layer, TokenMajorLayer) and layer.is_initialized]
    return [buffer for layer in kept for buffer in layer.buffers]


def _others(layers: Sequence[Any]) -> list[torch.Tensor]:
    """Returns what layers hold beside these buffers: windows and recurrent states."""
    found: list[torch.Tensor] = []
    for layer in layers:
        if isinstance(layer, RecurrentLayer):
            found += states_of(layer).values()
        elif isinstance(layer, SlidingWindowLayer) and layer.keys is not None:
            found += [layer.keys, layer.values]
    return found


def _sample_of(tensors: Sequence[torch.Tensor]) -> bytes:
    """Returns the bytes of some numbers of each tensor, for windows and states; see `_spread_places`."""
    places_of: dict[Hashable, torch.Tensor] = {}
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        sampled = _picked(tensor.detach()[0], places_of, _spread_places)
        by_device.setdefault(tensor.device, []).append(sampled.view(torch.uint8))
    return b"".join(torch.cat(sampled).cpu().numpy().tobytes() for sampled in by_device.values())


def _spread_places(row: torch.Tensor) -> torch.Tensor:
    """Returns places spread along a tensor's longest dimension, its last entry among them; see `_places`."""
    longest = max(row.shape)
    numbers = torch.arange(min(longest, MOST_PLACES), device="cpu")
    along = numbers * (longest - 1) // max(1, len(numbers) - 1)
    found = torch.zeros_like(numbers)
    for size, stride in zip(row.shape, row.stride(), strict=True):
        found += (along if size == longest else numbers * 7 % size) * stride
    return found


def _samples(buffers: Sequence[torch.Tensor], blocks: Sequence[Block]) -> list[str]:
    """Returns a digest per block, of the same numbers wherever they lie in memory."""
    buffers = [buffer for buffer in buffers if buffer.numel()]
    if not blocks or not buffers:
        return [""] * len(blocks)
    places = [[*range(block.start, block.end, STRIDE), block.end - 1] for block in blocks]
    tokens = torch.tensor([token for of_block in places for token in of_block], device="cpu")
    places_of: dict[Hashable, torch.Tensor] = {}
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for buffer in buffers:
        by_device.setdefault(buffer.device, []).append(_sampled(buffer, tokens, places_of))
    rows = torch.cat([torch.cat(sampled, dim=1).cpu() for sampled in by_device.values()], dim=1).numpy()
    edges = accumulate((len(of_block) * rows.shape[1] for of_block in places), initial=0)
    return list(checksums_between(rows.tobytes(), list(edges)))


def _sampled(buffer: torch.Tensor, tokens: torch.Tensor, places_of: dict[Hashable, torch.Tensor]) -> torch.Tensor:
    """Returns the bytes of one number per sampled token, `[sampled tokens, bytes]`.

    The head, and the number within it, vary from token to token.

    Args:
        buffer: of a layer.
        tokens: the sampled ones.
        places_of: where these numbers lie in memory, by the geometry of buffers; most buffers of a cache share one.
    """
    return _picked(buffer.detach()[0], places_of, lambda row: _places(row, tokens)).unsqueeze(1).view(torch.uint8)


def _picked(
    row: torch.Tensor, places_of: dict[Hashable, torch.Tensor], places: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Returns the numbers of a tensor that lie at these places in memory, which are determined once per geometry."""
    geometry = (row.device, row.shape, row.stride())
    if geometry not in places_of:
        places_of[geometry] = places(row).to(row.device)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(row.shape, row.stride(), strict=True))
    return row.as_strided((reach,), (1,)).index_select(0, places_of[geometry])


def _places(row: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns where the sampled numbers of these tokens lie in memory, counted in numbers from the first of the row."""
    (_, heads, head_dim), (by_token, by_head, by_number) = row.shape, row.stride()
    number = tokens // STRIDE
    return tokens * by_token + number % heads * by_head + number * 7 % head_dim * by_number


class SeenTokens:
    """Records which prompt tokens lie where in a cache; decoded tokens in between are not recorded."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, torch.Tensor]] = []

    def note(self, start: int, ids: torch.Tensor) -> None:
        """Records that tokens `[rows, new]` come into the cache, which holds `start` tokens."""
        end = self._pieces[-1][0] + self._pieces[-1][1].shape[1] if self._pieces else 0
        if start == 0 or start < end:  # something else has shortened the cache: the positions are no longer known
            self.forget()
        if start == 0 or end:
            self._pieces.append((start, ids.detach().clone()))

    def forget(self) -> None:
        """Forgets all tokens: the cache is empty, or its rows have changed."""
        self._pieces = []

    def crop(self, length: int) -> None:
        """Forgets the tokens beyond `length`, which the cache no longer holds."""
        self._pieces = [(start, ids[:, : length - start]) for start, ids in self._pieces if start < length]

    def require(self, prompt: torch.Tensor, mask: torch.Tensor | None, length: int, *, longer: bool = False) -> None:
        """Checks that the content of the cache, where it is known, is the start of a prompt.

        Args:
            prompt: `[rows, tokens]`, from its start on.
            mask: a mask of the same shape; None if nothing is masked.
            length: tokens in the cache.
            longer: the prompt must have more tokens than the cache.

        Raises:
            CakeError: it is not.
        """
        self.crop(length)
        if any(self._differs(prompt, mask, start, ids.to(prompt.device)) for start, ids in self._pieces):
            raise CakeError(f"The cache holds {length} tokens of another prompt; make a new CakeCache for this one.")
        if longer and prompt.shape[1] <= length:
            raise CakeError(
                f"The cache holds {length} tokens, and the prompt has only {prompt.shape[1]}; make a new CakeCache for it."
            )

    def known(self, length: int) -> torch.Tensor | None:
        """Returns the first `length` tokens `[rows, length]`; None if some of them are not recorded."""
        found, end = [], 0
        for start, ids in self._pieces:
            if start == end < length:
                found.append(ids[:, : length - start])
                end = start + found[-1].shape[1]
        return torch.cat(found, dim=1) if found and end == length else None

    def copy(self) -> SeenTokens:
        """Returns an independent copy."""
        copied = SeenTokens()
        copied._pieces = list(self._pieces)
        return copied

    @staticmethod
    def _differs(prompt: torch.Tensor, mask: torch.Tensor | None, start: int, ids: torch.Tensor) -> bool:
        common = prompt[:, start : start + ids.shape[1]]
        if prompt.shape[0] != ids.shape[0] and 1 not in (prompt.shape[0], ids.shape[0]):
            return False  # we cannot compare different numbers of rows
        unequal = common != ids[:, : common.shape[1]]
        if mask is not None and mask.shape == prompt.shape:
            unequal = unequal & (mask[:, start : start + common.shape[1]] != 0)
        return bool(unequal.any())
