"""The sliding windows of an engine's requests.

In the engine's memory, the layers with a window have the last tokens before the place where a request goes on, and no others.
So what loads bring of windows stays aside until the request's front has come to its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cake_hf.blocks import blocks
from cake_hf.chunks.codec import header_size, stored_bytes
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.restore.plan import windows_to_load
from cake_hf.serving.ledger import WindowLoads
from cake_hf.serving.restore import Restore
from cake_hf.serving.seams import Engine, RequestState


class Windows:
    """The windows of one engine's requests."""

    def __init__(self, engine: Engine, layout: ChunkLayout) -> None:
        self._engine, self._layout, self._size = engine, layout, layout.chunk_size
        self._tokens = max(0, engine.window - 1)
        self._full_bytes = sum(layout.sizes[: layout.everywhere])

    def loads(self, stored: Sequence[bool]) -> WindowLoads:
        """Returns which loads are to bring windows."""
        wanted = windows_to_load(stored, blocks(0, len(stored) * self._size, (), self._size), self._tokens)
        weight = stored_bytes(self._layout) / (header_size(self._layout) + self._full_bytes)
        return WindowLoads(frozenset(wanted if self._tokens else ()), -(-self._tokens // self._size), weight)

    def keep(self, restore: Restore, index: int, payload: torch.Tensor) -> None:
        """Keeps a copy of the windows that a load has brought.

        Args:
            payload: the payload of the chunk, flat uint8; it may be longer.
        """
        everywhere = self._layout.everywhere
        parts = payload[: self._layout.nbytes].split(self._layout.sizes)[everywhere:]
        restore.windows[index] = [
            part.view(piece.dtype).view(self._size, piece.heads, piece.head_dim)[-self._tokens :].clone()
            for part, piece in zip(parts, self._layout.pieces[everywhere:], strict=True)
        ]

    def move(self, restore: Restore, state: RequestState, chunk: int) -> None:
        """Sets a request's windows to the start of a chunk, over chunks that were loaded."""
        position, begin = chunk * self._size, state.position_offset // self._size
        count = min(self._tokens, position - state.position_offset)
        if count:
            reach = -(-self._tokens // self._size)
            kept = [restore.windows[index] for index in range(max(begin, chunk - reach), chunk)]
            joined = [torch.cat(list(parts))[-count:] for parts in zip(*kept, strict=True)]
            self._engine.put_windows(state, position - count, joined)
        for index in [index for index in list(restore.windows) if index < chunk]:
            del restore.windows[index]
