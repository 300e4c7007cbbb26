"""A store as a session uses it: access to it, saves to it, and the counts and notes kept beside its chunks."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch

from cake_hf.chunks.codec import ChunkMetadata, stored_bytes
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import CODEC as LOSSLESS
from cake_hf.chunks.lossless import is_native
from cake_hf.chunks.lossy import LOSSY, Method, is_lossy, lossy_method
from cake_hf.chunks.stored_forms import can_be_encoded
from cake_hf.keys import canonical
from cake_hf.limits import Limits
from cake_hf.model.reference import ReferencePlace
from cake_hf.report import Report
from cake_hf.scheduling.costs import MAX_SECONDS, encoding_pays
from cake_hf.stores.base import Store
from cake_hf.stores.opening import StoreSpec, store_name
from cake_hf.stores.records import Record, keep
from cake_hf.transfer.copy_streams import let_copies_out_end
from cake_hf.transfer.cost_notes import CostMemory, flush_costs, note_seconds, recall_costs
from cake_hf.transfer.deadline import Late, ask
from cake_hf.transfer.hits import count_hits, flush_hits
from cake_hf.transfer.single_flight import Sharing, sharing_of
from cake_hf.transfer.store_access import Access
from cake_hf.transfer.telemetry import observe, observe_save
from cake_hf.transfer.writer import Coded, SaveJob, pack
from cake_hf.util.forks import Lock
from cake_hf.util.interrupts import is_the_users
from cake_hf.util.redaction import shown

logger = logging.getLogger("cake_hf")

CODECS = ("none", LOSSLESS, "auto", *LOSSY)
LAYERED = (LOSSLESS, "auto")
"""Codecs whose chunks may be loaded without their refinements. (quantspec has such, too, but a lossy codec promises one output,
whatever happens.)"""

_DAY = 24 * 60 * 60

_recorded: weakref.WeakKeyDictionary[Store, dict[str, int]] = weakref.WeakKeyDictionary()
"""The day on which a namespace's record was written in this process, by namespace."""
_record_lock = Lock()


def check_codec(codec: str, *, exact: bool) -> None:
    """Refuses a codec that there is not, or that changes KV although it must not.

    Raises:
        ValueError: it does.
    """
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is unknown; choose one of {', '.join(CODECS)}.")
    if exact and is_lossy(codec):
        raise ValueError(f"codec {codec!r} is lossy: pass exact=False (--no-exact) with it, or take codec='lossless'.")


def checked_max_ttft(max_ttft: Any, codec: str, *, exact: bool) -> float | None:
    """Returns a time to the first token, of any kind of number, unless it cannot be kept by leaving something out.

    Raises:
        ValueError: it is not positive or too large, KV has to be exact, or the codec stores nothing that can be left out.
    """
    if max_ttft is None:
        return None
    is_number = isinstance(max_ttft, Real)
    if not is_number or isinstance(max_ttft, bool) or not 0 < max_ttft <= MAX_SECONDS:
        raise ValueError(f"max_ttft must be positive, and at most {MAX_SECONDS:,.0f} s; got {shown(repr(max_ttft))}.")
    if exact:
        raise ValueError("With max_ttft, KV may be loaded in part, so that it is not exact: pass exact=False with it.")
    if codec not in LAYERED:
        raise ValueError(
            f"With codec {codec!r}, chunks have no part that max_ttft could leave out; take codec='lossless' or 'auto'."
        )
    return float(max_ttft)  # sums with numpy's float32 would be rounded to milliseconds


class BoundStore:
    """One store, opened with the limits of a session.

    Args:
        store: what the user named.
        save: whether new chunks are saved to it.
        codec: the codec of new chunks, one of `CODECS`.

    Attributes:
        lossy: the lossy codec; None for an exact cache.
        name: the name of the store, for display.
        access: the access to it.

    Raises:
        StoreError: the store has never been usable, and is not now.
        CakeError: the codec needs a library that is not installed.
        Exception: any other error that the user's own store raises then.
    """

    def __init__(self, store: StoreSpec | None, limits: Limits, *, save: bool, codec: str = "none") -> None:
        self.limits = limits
        self._codec = codec
        self.lossy: Method | None = lossy_method(codec) if is_lossy(codec) else None
        self.access = Access(store, limits, save=save, share=sharing_of)
        self.name = store_name(store)
        self._count_lock = Lock()
        self._memories: dict[str, CostMemory] = {}

    @property
    def store(self) -> Store:
        """The store that keeps the chunks; while it cannot be used, a store that has nothing."""
        return self.access.store

    @property
    def saves(self) -> bool:
        """Whether new chunks are saved to the store."""
        return self.access.saves

    def encodes(self, namespace: str, layout: ChunkLayout) -> bool:
        """Returns whether new chunks are encoded, if their dtype allows it.

        With the codec "auto" they are, unless the store is in memory or, by what was learned of both, loading them would take
        longer than loading raw ones. That changes no key, and all forms are read. With a lossy codec, those chunks that stay
        exact are encoded by the lossless one.
        """
        if self._codec != "auto":
            return self._codec == LOSSLESS or self.lossy is not None
        if not is_native() or self.store.in_memory:
            return False
        memory = self._memories.get(namespace)
        return memory is None or encoding_pays(memory.costs(stored_bytes(layout)))

    @property
    def sharing(self) -> Sharing:
        """The part that all users of the store share."""
        return self.access.sharing

    def close(self, seconds: float) -> bool:
        """Saves what is queued, and closes the store if it is ours, all within `seconds`; False if saving took longer."""
        end = time.monotonic() + seconds
        flushed = self.access.writer.close()
        flush_costs(self.store, max(0.0, end - time.monotonic()))
        flush_hits(self.store, end - time.monotonic())
        self.access.close_store(end - time.monotonic())
        return flushed

    def reference_place(self, namespace: str, model: str) -> ReferencePlace:
        """Returns where the store keeps what the model of a namespace computes."""
        sharing, seconds = self.sharing, self.limits.lookup_timeout
        return ReferencePlace(self.store, namespace, model, self.saves, seconds, sharing.lookups, sharing.claims)

    def cost_memory(self, namespace: str, where: str) -> CostMemory:
        """Returns what computing on these devices, and loading from this store, costs with the model of that namespace."""
        memory = self._memories[namespace] = recall_costs(self.store, namespace, where, self.limits, self.sharing.notes)
        return memory

    def count(self, report: Report) -> None:
        """Passes the report of a finished prompt to telemetry, and counts the prompt beside the store."""
        observe(report)
        count_hits(self.store, report, self.limits, self.sharing.notes)

    def save_chunk(
        self,
        metadata: ChunkMetadata,
        layout: ChunkLayout,
        pieces: Callable[[], Sequence[torch.Tensor]],
        report: Report,
        *,
        overwrite: bool,
        made_with: dict[str, Any] | None,
        what: Literal["chunk", "tail", "state"] = "chunk",
        coded: Coded | None = None,
    ) -> None:
        """Copies a chunk out and queues it, or counts it as unsaved if there is no room. Never waits.

        Before a chunk's tensors are written to again, `let_copies_out_end` has to be called.

        Args:
            metadata: the chunk's metadata, without its checksums.
            pieces: returns its tensors `[1, chunk_size, heads, head_dim]` in payload order; called only if there is room.
            report: counts the outcome.
            overwrite: replace a stored chunk that turned out to be unusable.
            made_with: the metadata of the chunk's namespace, kept in the store once the chunk is there; None to keep none.
            what: the kind of value; a state is the snapshot at the end of a chunk or a tail.
            coded: the chunk as a lossy codec has encoded it; its tensors are not needed then.
        """
        record = self._recorder(metadata, made_with)

        def done(stored: int | None) -> None:
            saved = stored is not None
            if saved:
                record()
            with self._count_lock:
                if what == "state":
                    report.states_saved += saved
                elif what == "tail":
                    report.tails_saved += saved
                    report.chunks_unsaved += not saved
                else:
                    report.chunks_saved += saved
                    report.chunks_unsaved += not saved
                report.bytes_saved += layout.nbytes * saved
                report.bytes_stored += 0 if stored is None or overwrite else stored
            observe_save(saved, layout.nbytes)

        writer, encode = self.access.writer, what != "state" and self.encodes(metadata.namespace, layout)
        if self.lossy is not None:
            encode = encode and can_be_encoded(layout)
        if not writer.has_room(layout.nbytes):
            done(None)
            return
        try:
            payload = coded or pack(pieces(), layout)
        except (MemoryError, RuntimeError) as error:  # out of memory
            if is_the_users(error):
                raise
            writer.tell(error)
            done(None)
            return
        finally:
            if what == "state":
                # The next chunk changes the state. A chunk's KV stays while its restore lasts: any write there writes the same.
                let_copies_out_end()
        if not writer.offer(SaveJob(metadata, layout, payload, overwrite, done, encode)):
            done(None)

    def _recorder(self, chunk: ChunkMetadata, made_with: dict[str, Any] | None) -> Callable[[], None]:
        """Returns a function that records in the store, once the chunk is there, what the chunk was made with."""
        if made_with is None:
            return _keep_nothing
        seconds = note_seconds(self.limits)
        return recorder(self.store, made_with, chunk.namespace, chunk.model, seconds, self.sharing.notes)


def _keep_nothing() -> None:
    """Records nothing, since the metadata of the namespace is no longer known."""


def recorder(
    store: Store, metadata: Mapping[str, Any], namespace: str, model: str, seconds: float, late: Late
) -> Callable[[], None]:
    """Returns a function for the thread that writes to the store, to be called whenever a chunk of a namespace became durable.

    Args:
        store: with the chunk.
        metadata: the metadata that the namespace is a digest of, without the salt.
        model: its name, for display.
        seconds: that the thread waits for the write to finish.
        late: questions about notes that were not answered in time; while there are any, nothing is written.
    """

    def record() -> None:
        now = int(time.time())
        with _record_lock:
            days = _recorded.setdefault(store, {})
            if days.get(namespace) == now // _DAY:
                return
            days[namespace] = now // _DAY
        answer = ask(partial(_keep, store, metadata, namespace, model, now), seconds, "notes", late)
        if answer.error is not None:  # the chunk is there; only its description is missing
            logger.debug("What chunks were made with is not kept: %s", answer.trouble)

    return record


def _keep(store: Store, metadata: Mapping[str, Any], namespace: str, model: str, now: int) -> None:
    keep(store, Record(namespace, json.loads(canonical(metadata)), model, now, now))
