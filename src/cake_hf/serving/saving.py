"""Saves, behind the step, the chunks that an engine has computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Outcome
from cake_hf.serving.restore import Restore
from cake_hf.serving.seams import Engine
from cake_hf.transfer.copy_streams import let_copies_out_end


class Saver:
    """The saver of one engine.

    Args:
        session: with model and store.
        engine: whose memory has the chunks.
        layout: of a chunk.
    """

    def __init__(self, session: Session, engine: Engine, layout: ChunkLayout) -> None:
        self._session, self._engine, self._layout = session, engine, layout

    def blocks(self, restore: Restore, index: int) -> list[torch.Tensor]:
        """Returns the memory of a chunk in layers that keep all tokens: per block `[pieces, bytes]` uint8."""
        size = self._layout.chunk_size
        return self._engine.parts(restore.request_id, index * size, size, self._layout.everywhere)

    def pieces(self, restore: Restore, index: int, windows: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Returns a chunk's tensors `[1, tokens, heads, head_dim]` in payload order; see `EngineAudit.computed`."""
        blocks, everywhere = self.blocks(restore, index), self._layout.everywhere
        whole = [
            blocks[0][number] if len(blocks) == 1 else torch.cat([block[number] for block in blocks])
            for number in range(everywhere)
        ]
        full = [
            part.view(piece.dtype).view(1, self._layout.chunk_size, piece.heads, piece.head_dim)
            for part, piece in zip(whole, self._layout.pieces[:everywhere], strict=True)
        ]
        return [*full, *(window.unsqueeze(0) for window in windows)]

    def chunk(self, restore: Restore, index: int, windows: Sequence[torch.Tensor]) -> None:
        """Queues a chunk that was just computed, unless the store has it intact. Never waits; see `EngineAudit.computed`."""
        load = restore.outcomes.get(index)
        corrupt, gone = load is Outcome.CORRUPT, load is Outcome.MISSED
        if not restore.saves or (restore.stored[index] and not corrupt and not gone):
            return
        self._session.bound_store.save_chunk(
            restore.metadata(index, self._session.bound_model.name),
            self._layout,
            lambda: self.pieces(restore, index, windows),
            restore.report,
            overwrite=corrupt,
            made_with=self._session.bound_model.metadata_of(restore.namespace),
        )
        let_copies_out_end()  # the request may end, and its blocks be used again, after any step
