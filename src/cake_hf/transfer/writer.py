"""Write-behind: chunks wait in a background queue until its thread has made them durable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from cake_hf.chunks.codec import ChunkMetadata, checksums, encode_header
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import Encoded
from cake_hf.chunks.stored_forms import can_be_encoded, encoded_file, file_of
from cake_hf.errors import CakeError, NewerChunk, StoreError
from cake_hf.stores.background_queue import WRITER, QueueUser, Task
from cake_hf.stores.base import Part, Store, place_of, total_bytes
from cake_hf.transfer.chunk_reads import refuse_newer_in
from cake_hf.transfer.copy_streams import Slot, copy_out
from cake_hf.transfer.landing import byte_view
from cake_hf.transfer.telemetry import FaultLog

logger = logging.getLogger("cake_hf")


@dataclass(frozen=True)
class Coded:
    """A chunk that has gone through a lossy codec.

    Attributes:
        codec: its name.
        encoded: the chunk as it is stored.
        checksums: the checksums of what its pieces decode to.
    """

    codec: str
    encoded: Encoded
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class SaveJob:
    """One chunk on its way to the store.

    Attributes:
        metadata: the metadata of the chunk; the checksums are filled in by the writer.
        payload: its bytes, in memory that is no longer changed; copies from a GPU may still be under way. Or what a lossy codec
            has made of it.
        overwrite: whether the store has a chunk of this key that turned out to be unusable.
        done: called with the bytes that the chunk takes in the store, once it is durable; with None if it is not saved.
        encode: whether it is to be stored encoded, if that makes it smaller.
    """

    metadata: ChunkMetadata
    layout: ChunkLayout
    payload: Slot | Coded
    overwrite: bool
    done: Callable[[int | None], None]
    encode: bool = False


class Writer:
    """Saves the chunks of one session; a user of the background queue in front of a store.

    All writers of a process for one place share a thread and a byte budget. An offer beyond that budget is refused at once;
    nothing ever waits for room.

    Args:
        store: where chunks go.
        capacity: bytes of payload that may be under way, including those of other sessions.
        exit_flush_seconds: how long `close`, and leaving the interpreter, wait for what is queued.
        place: of the store, see `place_of`; the store is asked if it is not given.
        faults: the faults of all writers to that place; a new log if it is not given.
    """

    def __init__(
        self,
        store: Store,
        capacity: int,
        exit_flush_seconds: float,
        place: Hashable = None,
        faults: FaultLog | None = None,
    ) -> None:
        self._store = store
        known = place_of(store) if place is None else place
        self._queue = QueueUser(WRITER, lambda: known, capacity, exit_flush_seconds)
        self._faults = faults or FaultLog()

    def has_room(self, nbytes: int) -> bool:
        """Returns whether a chunk of that size would be accepted now; asked before the chunk is copied out."""
        return self._queue.has_room(nbytes)

    def offer(self, job: SaveJob) -> bool:
        """Queues a chunk; False, without any effect, if it does not fit, the writer is closed, or no thread is available."""
        return self._queue.offer(Task(job.metadata.key, job.layout.nbytes, partial(self._bring, job)))

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything offered to this writer, so far and meanwhile, is durable.

        Returns False on time-out, or, without a timeout, if one chunk takes longer than `exit_flush_seconds`.
        """
        return self._queue.flush(timeout)

    def close(self) -> bool:
        """Accepts nothing more and waits, within a bound, for what is queued; False on time-out."""
        return self._queue.close()

    def retire(self) -> None:
        """Accepts nothing more; what is queued is still written."""
        self._queue.retire()

    def _bring(self, job: SaveJob) -> None:
        stored = self._save(job)
        try:
            job.done(stored)
        except Exception:
            logger.exception("The saving of a chunk could not be reported.")

    def _save(self, job: SaveJob) -> int | None:
        try:
            parts = self._parts(job)
            if job.overwrite:
                self._spare_newer(job.metadata.key)
            self._store.write(job.metadata.key, parts, replace=job.overwrite)
            return total_bytes(parts)
        except BaseException as error:  # whatever a store's client raises must affect this chunk only
            self.tell(error)
            return None

    def _parts(self, job: SaveJob) -> list[Part]:
        """Returns the file of a chunk, in parts."""
        if isinstance(job.payload, Coded):
            coded = job.payload
            return file_of(coded.encoded, job.layout, replace(job.metadata, checksums=coded.checksums), coded.codec)
        job.payload.await_copy()
        payload = byte_view(job.payload.memory)
        metadata = replace(job.metadata, checksums=checksums(payload, job.layout))
        return self._encoded(job, payload, metadata) or [encode_header(job.layout, metadata), payload]

    def _spare_newer(self, key: str) -> None:
        """Raises NewerChunk if what is to be replaced is of a later version, and not damaged."""
        try:
            refuse_newer_in(self._store, key)
        except NewerChunk:
            raise
        except StoreError:
            return

    def _encoded(self, job: SaveJob, payload: memoryview, facts: ChunkMetadata) -> list[Part] | None:
        """Returns the encoded file of a chunk, in parts, once it was decoded and compared; None to store the chunk raw."""
        if not job.encode:
            return None
        if not can_be_encoded(job.layout):
            dtypes = ", ".join(sorted({str(piece.dtype) for piece in job.layout.pieces}))
            self._faults.tell(
                "dtype", "Chunks are stored as they are: the codec encodes bfloat16 only. This is %s.", dtypes
            )
            return None
        try:
            return encoded_file(payload, job.layout, facts)
        except (CakeError, ArithmeticError, MemoryError, ValueError) as error:
            self._faults.tell("codec", "A chunk is stored as it is, since encoding it failed. %s", error)
            return None

    def tell(self, error: BaseException) -> None:
        """Logs why a chunk is not saved: one line for the first fault; a full disk would otherwise log one per chunk."""
        advice = error if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
        self._faults.tell("saving", "Chunks are not being saved (generation goes on). %s", advice)


def pack(pieces: Sequence[torch.Tensor], layout: ChunkLayout) -> Slot:
    """Copies a chunk's pieces, on any device, into host memory in payload order.

    From a GPU the copies are still under way when this returns, see `copy_out`. Call `await_copy` before reading the memory.
    """
    slot = Slot(layout.nbytes, pinned=any(piece.device.type == "cuda" for piece in pieces))
    parts = zip(pieces, slot.memory.split(layout.sizes), strict=True)
    slot.copied_by(copy_out([part.view(piece.dtype).view(piece.shape) for piece, part in parts], pieces))
    return slot
