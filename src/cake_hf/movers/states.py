"""Reading what a model carries over the end of a chunk: one value, read and checked in a thread of its own."""

from __future__ import annotations

import logging
import threading

import torch

from cake_hf.arithmetic.threads import refusal
from cake_hf.movers.checking import Check
from cake_hf.movers.place import split_payload
from cake_hf.movers.sharing import ReadSlot
from cake_hf.stores.base import Store
from cake_hf.tensors.codec import header_size
from cake_hf.tensors.layout import ChunkLayout

logger = logging.getLogger("cake_hf")


class StateRead:
    """A read that begins at once, if at all. Its faults are answers, nothing is raised.

    Args:
        store: to read from.
        key: of the state.
        layout: of the state.
        slot: beside the budget of reads; None where no read may begin.
    """

    def __init__(self, store: Store, key: str, layout: ChunkLayout, slot: ReadSlot | None) -> None:
        self._store = store
        self._key = key
        self._layout = layout
        self._slot = slot
        self._payload: torch.Tensor | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name="cake-load-state", daemon=True)
        if slot is None:
            return
        if (error := refusal(self._thread)) is not None:  # no reason to fail
            slot.release()
            logger.warning("A stored state cannot be read: no more threads. %s", error)

    def wait(self, seconds: float) -> list[torch.Tensor] | None:
        """The state's pieces, flat and in their dtypes; None if it is missing, unusable, or not there within that time."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        payload = self._payload
        if payload is None:
            if self._thread.is_alive() and not self._told:
                self._told = True
                late = f"given up after {seconds:g} s (Limits.read_timeout)"
                logger.warning("A stored state did not come in time and is computed instead: %s.", late)
            return None
        parts = payload.split(list(self._layout.sizes))
        return [part.view(piece.dtype) for part, piece in zip(parts, self._layout.pieces, strict=True)]

    def leave(self) -> None:
        """Nobody waits for the state any more."""
        if self._slot is not None:
            self._slot.leave()

    def _run(self) -> None:
        try:
            self._read()
        finally:
            if self._slot is not None:
                self._slot.release()

    def _read(self) -> None:
        try:
            payload = torch.empty(self._layout.nbytes, dtype=torch.uint8, device="cpu")
            header = memoryview(bytearray(header_size(self._layout)))
            parts = split_payload(payload, self._layout)
            if self._store.read_into(self._key, [header, *parts]) is not None:
                Check(self._key, self._layout, header, parts).up_to(len(parts))
                self._payload = payload
        except BaseException as error:  # whatever a store's client raises: the prompt must not suffer from it
            logger.warning("A stored state is not usable and is computed instead. %s", error)
