"""The stored snapshots of one prompt's recurrent state, each read at most once."""

from __future__ import annotations

from functools import partial

import torch

from cake_hf.keys import state_key
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Strategy
from cake_hf.transfer.single_reads import ReadBeside, read_state


class StoredStates:
    """The stored snapshots that one restore reads.

    Attributes:
        loaded: chunks whose state was read and is good.
        unusable: chunks whose stored state is not usable.
    """

    def __init__(self, session: Session, prompt: Prompt) -> None:
        self.loaded: set[int] = set()
        self.unusable: set[int] = set()
        self._session = session
        self._prompt = prompt
        self._reads: dict[int, ReadBeside[list[torch.Tensor]]] = {}

    def begin(self, chunk: int) -> ReadBeside[list[torch.Tensor]]:
        """Starts to read the state at that chunk's end, unless that was done."""
        if chunk not in self._reads:
            key, limits = state_key(self._prompt.keys[chunk]), self._session.limits
            slot = self._session.bound_store.sharing.begin_beside(limits.loader_threads, limits.read_timeout)
            read = partial(read_state, self._session.bound_store.store, key, self._prompt.state_layout)
            self._reads[chunk] = ReadBeside(read, "state", slot)
        return self._reads[chunk]

    def get(self, chunk: int) -> list[torch.Tensor] | None:
        """Returns the state at that chunk's end; None if there is no usable one, or it does not come in time."""
        wanted = self._session.strategy is not Strategy.COMPUTE and self._prompt.match.states[chunk]
        if not wanted or chunk in self.unusable:
            return None
        states = self.begin(chunk).wait(self._session.limits.read_timeout)
        (self.unusable if states is None else self.loaded).add(chunk)
        return states

    def let_go(self) -> None:
        """Ends the restore: reads still under way are left to their threads."""
        for read in self._reads.values():
            read.leave()
