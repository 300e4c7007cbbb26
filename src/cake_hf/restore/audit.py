"""Compares computed chunks with their stored checksums: other bits mean that the store holds another model's KV.

The front of a prompt is computed while the rest is loaded, so comparing its checksum with the stored one costs next to nothing.
Only a few chunks are compared: the 1st, 2nd, 4th, 8th, ... of those that are computed although they are stored.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from cake_hf.chunks.codec import ChunkMetadata, checksums
from cake_hf.model.plainly import ComputePlainly
from cake_hf.model.ranks import ranks_of
from cake_hf.report import Refusal
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.transfer.landing import byte_view
from cake_hf.transfer.single_reads import ReadBeside, read_facts
from cake_hf.transfer.writer import pack
from cake_hf.util.forks import Lock

_refused: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Refusal]] = weakref.WeakKeyDictionary()
_lock = Lock()


class _Comparison(NamedTuple):
    chunk: int
    computed: tuple[str, ...]
    read: ReadBeside[ChunkMetadata]
    due: float


class Audit:
    """The audit of one restore.

    Args:
        session: of the cache. Without `exact`, equal bits are not expected, and nothing is compared.
        prompt: from `open_prompt`.
    """

    def __init__(self, session: Session, prompt: Prompt) -> None:
        self._session = session
        self._prompt = prompt
        # Ranks of a tensor-parallel model must all act alike.
        self._on = session.exact and bool(prompt.keys) and ranks_of(session.model) is None
        self._computed = 0
        self._under_way: list[_Comparison] = []

    def computed(self, index: int, pieces: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Starts to compare a chunk that was computed, if it is stored and due for comparison.

        Args:
            index: of the chunk.
            pieces: returns its tensors `[1, tokens, heads, head_dim]` in payload order.
        """
        if not self._on or not self._prompt.stored[index]:
            return
        self._computed += 1
        if self._computed & (self._computed - 1):  # not a power of two
            return
        session, layout = self._session, self._prompt.layout_of(index)
        packed = pack(pieces(), layout)
        packed.await_copy()
        slot = session.bound_store.sharing.begin_beside(session.limits.loader_threads, session.limits.read_timeout)
        read = ReadBeside(
            partial(read_facts, session.bound_store.store, self._prompt.keys[index], layout), "header", slot
        )
        due = time.monotonic() + session.limits.read_timeout
        self._under_way.append(_Comparison(index, checksums(byte_view(packed.memory), layout), read, due))

    def settle(self) -> None:
        """Waits for the comparisons that are under way. Chunks whose header cannot be read in time are not compared.

        Raises:
            ComputePlainly: a chunk is stored with other values than were computed.
        """
        while self._under_way:
            index, computed, read, due = self._under_way.pop(0)
            metadata = read.wait(max(0.0, due - time.monotonic()))
            if metadata is None:
                read.leave()
            elif metadata.checksums != computed:
                raise ComputePlainly(self._refuse(index))

    def end(self) -> None:
        """Ends the audit: the restore is over, or its later results are not to be compared."""
        self._on = False
        for comparison in self._under_way:
            comparison.read.leave()
        self._under_way.clear()

    def _refuse(self, index: int) -> Refusal:
        """Records that the model, under this namespace, does not compute what is stored; returns the refusal."""
        refusal = Refusal(
            "differs-from-store",
            f"this model does not compute what the store holds (chunk {self._prompt.number + index} is stored with other "
            "values), so something changed it, now or when that was saved. Nothing is loaded or saved for it in this "
            "process; cake-hf verify --recompute finds what is wrong in the store",
        )
        with _lock:
            _refused.setdefault(self._session.model, {})[self._prompt.namespace] = refusal
        return refusal


def audit_refusal(model: torch.nn.Module, namespace: str) -> Refusal | None:
    """Returns why nothing is loaded or saved for that model under that namespace; None if it can be."""
    with _lock:
        return _refused.get(model, {}).get(namespace)
