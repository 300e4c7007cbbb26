"""Saves the chunks that a restore computes, and hands them to concurrent restores (single flight)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from cake_hf.layers import TokenMajorLayer
from cake_hf.restore.audit import Audit
from cake_hf.restore.carried import Carried, StoredStates
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Frontier, Outcome
from cake_hf.transfer.loader import SHARED
from cake_hf.transfer.single_flight import Flight, FlightPlan
from cake_hf.transfer.writer import Coded, pack


class Saver:
    """The saver of one prompt.

    Args:
        layers: the layers of the cache that keep each token.
        prompt: from `open_prompt`.
        audit: the audit of the restore. Nothing is saved before the comparisons under way have found equal checksums.
    """

    def __init__(
        self,
        session: Session,
        layers: Sequence[TokenMajorLayer],
        prompt: Prompt,
        carried: Carried,
        stored: StoredStates,
        audit: Audit,
    ) -> None:
        self._session = session
        self._layers = layers
        self._prompt = prompt
        self._carried = carried
        self._stored = stored
        self._audit = audit

    def chunk(self, index: int, load: Outcome | None = None, coded: Coded | None = None) -> None:
        """Queues a chunk that was just computed on the canonical schedule, unless the store has it intact.

        Args:
            load: how the attempt to load it ended, if there was one.
            coded: what a lossy codec has made of it, to be stored as that; None to store what is in the layers.

        Raises:
            ComputePlainly: the model does not compute what the store holds.
        """
        session, prompt = self._session, self._prompt
        corrupt, gone = load is Outcome.CORRUPT, load is Outcome.MISSED
        if (
            not session.bound_store.saves
            or not prompt.keys
            or (prompt.match.stored[index] and not corrupt and not gone)
        ):
            return
        self._audit.settle()
        pieces = partial(self.pieces, index)
        session.bound_store.save_chunk(
            prompt.metadata(session, index),
            prompt.layout_of(index),
            pieces,
            prompt.report,
            overwrite=corrupt,
            made_with=session.bound_model.metadata_of(prompt.namespace),
            what="chunk" if index in prompt.counted else "tail",
            coded=coded,
        )

    def state(self, index: int) -> None:
        """Queues a snapshot of the state, which stands at that chunk's end, if one is to be kept there."""
        session, prompt = self._session, self._prompt
        if (
            not session.bound_store.saves
            or not prompt.keys
            or not prompt.state_layout.pieces
            or not self._is_due(index)
        ):
            return
        unusable = index in self._stored.unusable
        if prompt.match.states[index] and not unusable:
            return
        states = self._carried.states()
        if any(
            state.dtype != p.dtype or state.numel() != p.heads * p.head_dim for state, p in self._with_pieces(states)
        ):
            return  # another shape than in the probe, so the layout does not fit
        self._audit.settle()
        session.bound_store.save_chunk(
            prompt.state_metadata(session, index),
            prompt.state_layout,
            lambda: states,
            prompt.report,
            overwrite=unusable,
            made_with=session.bound_model.metadata_of(prompt.namespace),
            what="state",
        )

    def pieces(self, index: int) -> list[torch.Tensor]:
        """Returns a block's pieces `[1, tokens, heads, head_dim]` in the layers; it must have just been computed."""
        start, end, _ = self._prompt.blocks[index].shifted(self._prompt.call.past)
        kept = [buffer[:, start:end] for layer in self._layers for buffer in layer.buffers]
        return [*kept, *(self._carried.block(index) or ())]

    def _is_due(self, index: int) -> bool:
        """Returns whether a snapshot is due: around tails, where what is stored or shared of the prompt ends, and every
        `snapshot_every` chunks.
        """
        prompt, every = self._prompt, self._session.snapshot_every
        shared = next((i for i, has in enumerate(prompt.match.stored) if not has), len(prompt.match.stored))
        due = index in (prompt.chunks - 1, len(prompt.keys) - 1, shared - 1)
        due = due or not all(near in prompt.full for near in (index, index + 1) if near < len(prompt.blocks))
        return due or (every > 0 and (prompt.number + index + 1) % every == 0)

    def _with_pieces(self, states: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, Any]]:
        return list(zip(states, self._prompt.state_layout.pieces, strict=True))


class Flights:
    """The flights of one restore.

    Args:
        prompt: from `open_prompt`.
        restore: identifies the restore; any object that no other restore uses.
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
