"""Single flight between restores: chunks that concurrent restores compute for each other."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from cake_hf.restore.prompt import Prompt
from cake_hf.restore.saving import Saver
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Frontier
from cake_hf.transfer.loader import SHARED
from cake_hf.transfer.single_flight import Flight, FlightPlan
from cake_hf.transfer.writer import pack


class Flights:
    """The flights of one restore.

    Args:
        session: of the cache.
        prompt: from `open_prompt`.
        restore: whose flights these are: any object of its own.
        frontier: the ledger.
        saver: knows where chunks lie in the layers.
        alone: the restore computes everything itself.

    Attributes:
        shared: chunks that the main thread got from another restore.
    """

    def __init__(
        self, session: Session, prompt: Prompt, restore: object, frontier: Frontier, saver: Saver, *, alone: bool
    ) -> None:
        self.shared: set[int] = set()
        self._bound = session.bound_store
        self._patience = session.limits.read_timeout
        self._prompt = prompt
        self._restore = restore
        self._frontier = frontier
        self._saver = saver
        self._alone = alone or not prompt.keys

    def flight(self, index: int) -> AbstractContextManager[FlightPlan]:
        """Announces that a chunk is going to be computed here, or finds out that another restore is computing it."""
        # Other restores must not wait for a forward that may be preempted, and it must not wait for theirs.
        # Nor may they get what is computed behind rounded chunks.
        if self._alone or self._frontier.is_trial(index) or index > self._frontier.exact_until():
            return nullcontext(FlightPlan(None))
        key = self._prompt.keys[index]
        return self._bound.sharing.flight(key, self._restore, computes=True, saves=self._bound.saves)

    def take_over(self, index: int, flight: Flight) -> bool:
        """Copies a chunk that another restore is computing; returns False if it does not come."""
        begin = time.monotonic()
        if not flight.wait(self._patience) or flight.payload is None:
            return False
        self._copy_in(index, flight.payload)
        self._frontier.computed(index)
        self.shared.add(index)
        self._prompt.record("compute", index, begin, time.monotonic(), SHARED)
        if not flight.saves:
            self._saver.chunk(index)
        return True

    def hand_out(self, index: int, plan: FlightPlan) -> None:
        """Offers a computed chunk to other restores."""
        plan.payload = partial(self._copy_out, index)

    def _copy_in(self, index: int, payload: torch.Tensor) -> None:
        """Copies a chunk's payload, `[nbytes]` uint8 on the host, to the layers' current buffers: they may have moved out."""
        offset = 0
        with torch.inference_mode():
            for piece in self._saver.pieces(index):
                target = piece.view(torch.uint8)
                target.copy_(payload[offset : offset + target.numel()].view(target.shape))
                offset += target.numel()

    def _copy_out(self, index: int) -> torch.Tensor:
        packed = pack(self._saver.pieces(index), self._prompt.layout_of(index))
        packed.await_copy()
        return packed.memory
