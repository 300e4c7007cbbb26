"""What of a prompt's stored chunks is loaded: which chunks, the windows of which, and which snapshot of the recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cake_hf.cache.prompt import Prompt
from cake_hf.tensors.layout import ChunkLayout


@dataclass(frozen=True)
class LoadPlan:
    """What the loaders are to bring.

    Attributes:
        usable: for each chunk, whether loading it helps.
        windows: the chunks whose windowed pieces are wanted, and where these lie in their buffers, counted in chunks.
        state: at the end of which chunk the snapshot is wanted; None for none.
    """

    usable: list[bool]
    windows: dict[int, int]
    state: int | None


def plan_loads(prompt: Prompt, window_chunks: int) -> LoadPlan:
    """Decide for one prompt.

    Args:
        prompt: from `look_up`.
        window_chunks: how many chunks the model's longest window reaches back.
    """
    stored, state = prompt.stored[: prompt.chunks], None
    if prompt.state_layout.pieces:
        begin, state = _between_states(stored, prompt.states)
        stored = [state is not None and begin <= index <= state for index in range(prompt.chunks)]
    return LoadPlan(stored, _windows(stored, window_chunks), state)


def _between_states(stored: Sequence[bool], states: Sequence[bool]) -> tuple[int, int | None]:
    """The run of stored chunks, up to one with a snapshot at its end, that leaves the fewest chunks to compute.

    What is before the run is computed from the front, what is after it from the snapshot on.
    """
    best: tuple[int, int | None] = (0, None)
    fewest, begin = len(stored), 0
    for index, has in enumerate(stored):
        if not has:
            begin = index + 1
        elif states[index] and begin + len(stored) - index - 1 < fewest:
            best, fewest = (begin, index), begin + len(stored) - index - 1
    return best


def _windows(usable: Sequence[bool], window_chunks: int) -> dict[int, int]:
    """The model goes on at the end and behind each run of loaded chunks: there it needs the windows before it."""
    wanted: set[int] = set()
    for stop in range(1, len(usable) + 1):
        if usable[stop - 1] and (stop == len(usable) or not usable[stop]):
            wanted.update(index for index in range(max(0, stop - window_chunks), stop) if usable[index])
    return {index: position for position, index in enumerate(sorted(wanted))}


class WindowBuffers:
    """Where the windowed pieces of loaded chunks land: room for those that are wanted only.

    Args:
        layout: of a chunk.
        windows: see `LoadPlan`.
        like: the model's layers with one token in them; each has its buffers on its own device.
    """

    def __init__(self, layout: ChunkLayout, windows: dict[int, int], like: Sequence[Any]) -> None:
        self._size = layout.chunk_size
        self._windows = windows
        with torch.inference_mode(False):
            self.buffers = [
                torch.empty(
                    (1, len(windows) * self._size, piece.heads, piece.head_dim),
                    dtype=piece.dtype,
                    device=like[piece.layer].keys.device,
                )
                for piece in layout.pieces[layout.everywhere :]
            ]

    def block(self, chunk: int) -> list[torch.Tensor] | None:
        """The windowed pieces of a chunk that was loaded; None if they were not wanted."""
        if chunk not in self._windows:
            return None
        start = self._windows[chunk] * self._size
        return [buffer[:, start : start + self._size] for buffer in self.buffers]
