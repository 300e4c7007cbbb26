"""The buffers that receive the sliding-window pieces of loaded chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cake_hf.restore.prompt import Prompt


class WindowBuffers:
    """Buffers for only those sliding-window pieces that are wanted.

    Args:
        prompt: from `open_prompt`.
        windows: see `RestorePlan`.
        template: the model's layers with some tokens in them; each has its buffers on its own device.
    """

    def __init__(self, prompt: Prompt, windows: dict[int, int], template: Sequence[Any]) -> None:
        self._blocks = prompt.blocks
        self._windows = windows
        layout, tokens = prompt.layout, sum(prompt.blocks[index].tokens for index in windows)
        with torch.inference_mode(False):
            self.buffers = [
                torch.empty(
                    (1, tokens, piece.heads, piece.head_dim),
                    dtype=piece.dtype,
                    device=template[piece.layer].keys.device,
                )
                for piece in layout.pieces[layout.everywhere :]
            ]

    def block(self, chunk: int) -> list[torch.Tensor] | None:
        """Returns the sliding-window pieces of a chunk that was loaded; None if they were not wanted."""
        if chunk not in self._windows:
            return None
        start = self._windows[chunk]
        return [buffer[:, start : start + self._blocks[chunk].tokens] for buffer in self.buffers]
