"""Compares what an engine computes with what is stored of it (`restore.audit`), without making a step wait.

While a comparison of a request is under way, its loaded chunks are not used yet, and its computed chunks are not saved yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.model.plainly import ComputePlainly
from cake_hf.restore.audit import Comparison, is_due, refuse_model
from cake_hf.restore.session import Session
from cake_hf.serving.restore import Restore
from cake_hf.serving.saving import Saver


class EngineAudit:
    """The audit of one engine's restores.

    Args:
        session: with model and store. Without `exact`, equal bits are not expected, and nothing is compared.
        layout: of a chunk.
        saver: of computed chunks.
        wake: called, in another thread, when a comparison can be settled.
    """

    def __init__(self, session: Session, layout: ChunkLayout, saver: Saver, wake: Callable[[], None]) -> None:
        self._session, self._layout, self._saver, self._wake = session, layout, saver, wake

    def computed(self, restore: Restore, index: int, windows: Sequence[torch.Tensor]) -> None:
        """Takes a chunk that was just computed: it is compared if it is stored and due for that, and saved by `settle`.

        Args:
            restore: of the request.
            index: of the chunk.
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
