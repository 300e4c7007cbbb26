"""Compares computed chunks with their stored checksums: other bits mean that the store holds another model's KV.

The front of a prompt is computed while the rest is loaded, so comparing its checksum with the stored one costs next to nothing.
Only a few chunks are compared: the 1st, 2nd, 4th, 8th, ... of those that are computed although they are stored.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence

import torch

from cake_hf.chunks.codec import checksums
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.model.plainly import ComputePlainly
from cake_hf.model.ranks import ranks_of
from cake_hf.report import Refusal
from cake_hf.restore.bound_store import BoundStore
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.transfer.copy_streams import Slot
from cake_hf.transfer.landing import byte_view
from cake_hf.transfer.single_reads import ReadBeside, read_facts
from cake_hf.transfer.writer import pack
from cake_hf.util.forks import Lock

_refused: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Refusal]] = weakref.WeakKeyDictionary()
_lock = Lock()


class Comparison:
    """One computed chunk beside the checksums that the store has of it.

    A thread of its own waits for the copy from the GPU, computes the chunk's checksums, and reads the stored ones. The main
    thread goes on meanwhile.

    Args:
        bound_store: that has the chunk.
        pieces: its tensors `[1, tokens, heads, head_dim]` in payload order. They are copied, so they may change afterwards.
        chunk: its index.
        ended: called, in another thread, when the checksums have been read.

    Attributes:
        due: monotonic time after which the store is not waited for any more.
    """

    def __init__(
        self,
        bound_store: BoundStore,
        key: str,
        layout: ChunkLayout,
        pieces: Sequence[torch.Tensor],
        chunk: int,
        ended: Callable[[], None] | None = None,
    ) -> None:
        limits = bound_store.limits
        packed: Slot | None = pack(pieces, layout)

        def compare() -> bool | None:
            nonlocal packed
            assert packed is not None
            packed.await_copy()
            computed = checksums(byte_view(packed.memory), layout)
            packed = None  # a store may hang
            facts = read_facts(bound_store.store, key, layout)
            return None if facts is None else facts.checksums != computed

        self.chunk = chunk
        self.due = time.monotonic() + limits.read_timeout
        slot = bound_store.sharing.begin_beside(limits.loader_threads, limits.read_timeout)
        self._read = ReadBeside(compare, "header", slot, ended)

    def is_over(self) -> bool:
        """Returns whether `differs` would not wait."""
        return self._read.is_over() or time.monotonic() >= self.due

    def differs(self) -> bool:
        """Waits for the store, until `due`. Returns whether it has other values; False if it does not say."""
        found = self._read.wait(max(0.0, self.due - time.monotonic()))
        if found is None:
            self.leave()
        return bool(found)

    def leave(self) -> None:
        """Abandons the read."""
        self._read.leave()


def is_due(count: int) -> bool:
    """Returns whether the `count`-th chunk that was computed although it is stored is compared: 1, 2, 4, 8, ..."""
    return not count & (count - 1)


class Audit:
    """The audit of one restore.

    Args:
        session: the session of the cache. Without `exact`, equal bits are not expected, and nothing is compared.
        prompt: from `open_prompt`.
    """

    def __init__(self, session: Session, prompt: Prompt) -> None:
        self._session = session
        self._prompt = prompt
        # Ranks of a tensor-parallel model must all act alike.
        self._on = session.exact and bool(prompt.keys) and ranks_of(session.model) is None
        self._computed = 0
        self._under_way: list[Comparison] = []

    def computed(self, index: int, pieces: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Starts to compare a chunk that was computed, if it is stored and due for comparison.

        Args:
            pieces: returns its tensors `[1, tokens, heads, head_dim]` in payload order.
        """
        if not self._on or not self._prompt.stored[index]:
            return
        self._computed += 1
        if is_due(self._computed):
            layout, key = self._prompt.layout_of(index), self._prompt.keys[index]
            self._under_way.append(Comparison(self._session.bound_store, key, layout, pieces(), index))

    def settle(self) -> None:
        """Waits for the comparisons that are under way. Chunks whose header cannot be read in time are not compared.

        Raises:
            ComputePlainly: a chunk is stored with other values than were computed.
        """
        while self._under_way:
            comparison = self._under_way.pop(0)
            if comparison.differs():
                number = self._prompt.number + comparison.chunk
                raise ComputePlainly(refuse_model(self._session.model, self._prompt.namespace, number))

    def end(self) -> None:
        """Ends the audit: the restore is over, or its later results are not to be compared."""
        self._on = False
        for comparison in self._under_way:
            comparison.leave()
        self._under_way.clear()


def refuse_model(model: torch.nn.Module, namespace: str, number: int) -> Refusal:
    """Records that a model, under this namespace, does not compute what is stored; returns the refusal."""
    refusal = Refusal(
        "differs-from-store",
        f"this model does not compute what the store holds (chunk {number} is stored with other values), so something "
        "changed it, now or when that was saved. Nothing is loaded or saved for it in this process; cake-hf verify "
        "--recompute finds what is wrong in the store",
    )
    with _lock:
        _refused.setdefault(model, {})[namespace] = refusal
    return refusal


def audit_refusal(model: torch.nn.Module, namespace: str) -> Refusal | None:
    """Returns why nothing is loaded or saved for that model under that namespace; None if it can be."""
    with _lock:
        return _refused.get(model, {}).get(namespace)
