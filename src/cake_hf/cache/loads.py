"""What of a prompt's stored chunks is loaded: which chunks, the windows of which, and which snapshot of the recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from cake_hf.arithmetic.schedule import Block
from cake_hf.cache.prompt import Prompt


@dataclass(frozen=True)
class LoadPlan:
    """What the loaders are to bring.

    Attributes:
        usable: for each chunk, whether loading it helps.
        windows: the chunks whose windowed pieces are wanted, and where these lie in their buffers, counted in tokens.
        state: at the end of which chunk the snapshot is wanted; None for none.
    """

    usable: list[bool]
    windows: dict[int, int]
    state: int | None


def plan_loads(prompt: Prompt, reach: int) -> LoadPlan:
    """Decide for one prompt.

    Args:
        prompt: from `look_up`.
        reach: how many tokens the model's longest window reaches back.
    """
    stored, state = prompt.stored[: prompt.chunks], None
    if prompt.state_layout.pieces:
        begin, state = _between_states(stored, prompt.states)
        stored = [state is not None and begin <= index <= state for index in range(prompt.chunks)]
    return LoadPlan(stored, _windows(stored, prompt.blocks, reach), state)


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


def window_begin(named: Sequence[Block], stop: int, reach: int) -> int:
    """The first block of those before block `stop` that a window of that reach, at the begin of block `stop`, reaches to."""
    begin = stop
    while begin and named[begin - 1].end > named[stop - 1].end - reach:
        begin -= 1
    return begin


def _windows(usable: Sequence[bool], named: Sequence[Block], reach: int) -> dict[int, int]:
    """The model goes on at the end and behind each run of loaded chunks: there it needs the windows before it."""
    wanted: set[int] = set()
    for stop in range(1, len(usable) + 1):
        if usable[stop - 1] and (stop == len(usable) or not usable[stop]):
            wanted.update(index for index in range(window_begin(named, stop, reach), stop) if usable[index])
    ends = accumulate(named[index].tokens for index in sorted(wanted))
    return {index: end - named[index].tokens for index, end in zip(sorted(wanted), ends, strict=True)}


class WindowBuffers:
    """Where the windowed pieces of loaded chunks land: room for those that are wanted only.

    Args:
        prompt: from `look_up`.
        windows: see `LoadPlan`.
        like: the model's layers with one token in them; each has its buffers on its own device.
    """

    def __init__(self, prompt: Prompt, windows: dict[int, int], like: Sequence[Any]) -> None:
        self._blocks = prompt.blocks
        self._windows = windows
        layout, tokens = prompt.layout, sum(prompt.blocks[index].tokens for index in windows)
        with torch.inference_mode(False):
            self.buffers = [
                torch.empty(
                    (1, tokens, piece.heads, piece.head_dim),
                    dtype=piece.dtype,
                    device=like[piece.layer].keys.device,
                )
                for piece in layout.pieces[layout.everywhere :]
            ]

    def block(self, chunk: int) -> list[torch.Tensor] | None:
        """The windowed pieces of a chunk that was loaded; None if they were not wanted."""
        if chunk not in self._windows:
            return None
        start = self._windows[chunk]
        return [buffer[:, start : start + self._blocks[chunk].tokens] for buffer in self.buffers]
