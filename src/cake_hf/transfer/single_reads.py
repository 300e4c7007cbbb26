"""Reads of single values beside the loaders: states at the end of a chunk, and a chunk's metadata."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from cake_hf.chunks.codec import ChunkMetadata, check_header, header_size
from cake_hf.chunks.encoded_header import check_encoded_header, encoded_header_size, is_encoded
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.stores.base import Store
from cake_hf.transfer.deadline import wait_budget
from cake_hf.transfer.landing import Check, split_payload
from cake_hf.transfer.single_flight import ReadSlot
from cake_hf.util.forks import refusal

logger = logging.getLogger("cake_hf")

T = TypeVar("T")


class ReadBeside(Generic[T]):
    """A read in a thread of its own that starts at once or never. Its faults are logged, and nothing is raised.

    Args:
        read: returns the value read, or None.
        what: what is read, for messages.
        slot: beside the budget of reads; None if no read may start.
        ended: called in that thread when the read is over.
    """

    def __init__(
        self,
        read: Callable[[], T | None],
        what: str,
        slot: ReadSlot | None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self._read = read
        self._ended = ended
        self._over = False
        self._what = what
        self._slot = slot
        self._result: T | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name=f"cake-load-{what}", daemon=True)
        if slot is None:
            self._over = True
        elif (error := refusal(self._thread)) is not None:  # not a reason to fail
            self._over = True
            slot.release()
            logger.warning("A stored %s cannot be read: no more threads. %s", what, error)

    def wait(self, seconds: float) -> T | None:
        """Returns the value read; None if it is missing, unusable, or not there within that time or the prompt's budget."""
        if self._thread.ident is not None:
            budget = wait_budget()
            seconds = budget.grant(seconds)
            self._thread.join(seconds)
            if not self._thread.is_alive():
                return self._result
            budget.spend(seconds)
            if not self._told:
                self._told = True
                logger.warning(
                    "A stored %s did not come in time: left after %g s (read_timeout, max_ttft).", self._what, seconds
                )
        return self._result

    def is_over(self) -> bool:
        """Returns whether the read has ended, or was never started."""
        return self._over

    def leave(self) -> None:
        """Abandons the read: its result is no longer waited for."""
        if self._slot is not None:
            self._slot.leave()

    def _run(self) -> None:
        try:
            self._result = self._read()
        except BaseException as error:  # whatever a store's client raises must not affect the prompt
            logger.warning("A stored %s cannot be used. %s", self._what, error)
        finally:
            if self._slot is not None:
                self._slot.release()
            self._over = True
            if self._ended is not None:
                self._ended()


def read_state(store: Store, key: str, layout: ChunkLayout) -> list[torch.Tensor] | None:
    """Returns a stored state's pieces, flat and in their dtypes; None for a miss.

    Raises:
        Exception: the state cannot be read, or is not as it was written.
    """
    payload = torch.empty(layout.nbytes, dtype=torch.uint8, device="cpu")
    header = memoryview(bytearray(header_size(layout)))
    parts = split_payload(payload, layout)
    if store.read_into(key, [header, *parts]) is None:
        return None
    Check(key, layout, header, parts).up_to(len(parts))
    return [
        part.view(piece.dtype) for part, piece in zip(payload.split(list(layout.sizes)), layout.pieces, strict=True)
    ]


def read_facts(store: Store, key: str, layout: ChunkLayout) -> ChunkMetadata | None:
    """Returns a stored chunk's metadata, with the checksums of its KV in whichever form it is stored; None for a miss.

    Raises:
        Exception: the metadata cannot be read, or is not as it was written.
    """
    header = store.head(key, header_size(layout))
    if header is None or not is_encoded(header):
        return None if header is None else check_header(header, key, layout)
    whole = store.head(key, encoded_header_size(layout))
    return None if whole is None else check_encoded_header(whole, key, layout).facts
