"""Compares the chunks that an engine computes with the stored ones (`restore.audit`), and saves them, behind the step.

While a comparison of a request is under way, its loaded chunks are not used yet, and its computed chunks are not saved yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.model.plainly import ComputePlainly
from cake_hf.restore.audit import Comparison, is_due, refuse_model
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Outcome
from cake_hf.serving.restore import Restore
from cake_hf.serving.seams import Engine
from cake_hf.transfer.copy_streams import let_copies_out_end


class Saver:
    """The saver of one engine."""

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


class EngineAudit:
    """The audit of one engine's restores.

    Args:
        session: with model and store. Without `exact`, equal bits are not expected, and nothing is compared.
        saver: the saver of computed chunks.
        wake: called, in another thread, when a comparison can be settled.
    """

    def __init__(self, session: Session, layout: ChunkLayout, saver: Saver, wake: Callable[[], None]) -> None:
        self._session, self._layout, self._saver, self._wake = session, layout, saver, wake

    def computed(self, restore: Restore, index: int, windows: Sequence[torch.Tensor]) -> None:
        """Takes a chunk that was just computed: it is compared if it is stored and due for that, and saved by `settle`.

        Args:
            windows: its pieces of layers with a sliding window, `[tokens, heads, head_dim]`.
        """
        restore.unsaved[index] = windows
        if not self._session.exact or not restore.stored[index]:
            return
        restore.recomputed += 1
        if is_due(restore.recomputed):
            pieces = self._saver.pieces(restore, index, windows)
            restore.comparisons.append(
                Comparison(
                    self._session.bound_store, restore.keys[index], self._layout, pieces, index, ended=self._wake
                )
            )

    def settle(self, restore: Restore) -> bool:
        """Saves what was computed, if no comparison is under way; returns False, and does nothing, if one is.

        Raises:
            ComputePlainly: a chunk is stored with other values than were computed.
        """
        while restore.comparisons:
            if not restore.comparisons[0].is_over():
                return False
            comparison = restore.comparisons.pop(0)
            if comparison.differs():
                raise ComputePlainly(refuse_model(self._session.model, restore.namespace, comparison.chunk))
        for index in list(restore.unsaved):
            self._saver.chunk(restore, index, restore.unsaved.pop(index))
        return True

    def end(self, restore: Restore) -> None:
        """Ends the audit of a request: what is still under way is not waited for, and what was computed is not saved."""
        for comparison in restore.comparisons:
            comparison.leave()
        restore.comparisons.clear()
        restore.unsaved.clear()
