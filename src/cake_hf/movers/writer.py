"""Write-behind: chunks wait in a queue bounded in bytes, and one background thread makes them durable."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from cake_hf.arithmetic.errors import StoreError
from cake_hf.movers.place import byte_view
from cake_hf.movers.slots import Slot
from cake_hf.movers.streams import copy_out
from cake_hf.stores.base import Store
from cake_hf.tensors.codec import ChunkFacts, checksums, encode_header
from cake_hf.tensors.layout import ChunkLayout

logger = logging.getLogger("cake_hf")

WRITER_NICENESS = 19
"""The writer yields the processor to the model: what it does is never urgent."""


@dataclass(frozen=True)
class SaveJob:
    """One chunk on its way to the store.

    Attributes:
        facts: what the chunk says about itself; the checksums are filled in by the writer.
        layout: of the chunk.
        payload: its bytes, in memory that nobody else changes; from a GPU they may still be coming.
        overwrite: the store has a chunk of this key that turned out to be unusable.
        done: called with whether the chunk is durable now.
    """

    facts: ChunkFacts
    layout: ChunkLayout
    payload: Slot
    overwrite: bool
    done: Callable[[bool], None]


class Writer:
    """Queue and thread in front of a store.

    Invariant: `bytes of queued jobs + bytes of the job being written <= capacity`. An offer that would break it is
    refused at once; nothing ever waits for room.

    Args:
        store: where chunks go.
        capacity: bytes of payload that may be under way.
        exit_flush_seconds: how long leaving the interpreter waits for what is queued.
    """

    def __init__(self, store: Store, capacity: int, exit_flush_seconds: float) -> None:
        self._store = store
        self._capacity = capacity
        self._exit_flush_seconds = exit_flush_seconds
        self._changed = threading.Condition()
        self._queue: deque[SaveJob] = deque()
        self._bytes = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._told = False

    def has_room(self, nbytes: int) -> bool:
        """Whether a chunk of that size would be taken now; asked before the chunk is copied out."""
        with self._changed:
            return not self._closed and self._bytes + nbytes <= self._capacity

    def offer(self, job: SaveJob) -> bool:
        """Queue a chunk; False, and nothing happens, where it does not fit, the writer is closed, or can have no thread."""
        with self._changed:
            if self._closed or self._bytes + job.layout.nbytes > self._capacity or not self._has_thread():
                return False
            self._queue.append(job)
            self._bytes += job.layout.nbytes
            self._changed.notify_all()
            return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything offered so far, and what is offered meanwhile, is durable; False on time-out."""
        with self._changed:
            return self._changed.wait_for(lambda: self._bytes == 0, timeout)

    def close(self) -> bool:
        """Take nothing more, wait for what is queued (with a bound), and end the thread; False on time-out."""
        thread = self._thread
        self.retire()
        flushed = self.flush(self._exit_flush_seconds)
        # A daemon thread that is still inside native code when the interpreter goes down can abort the process.
        if flushed and thread is not None and thread is not threading.current_thread():
            thread.join(self._exit_flush_seconds)
        return flushed

    def retire(self) -> None:
        """Take nothing more; the thread ends by itself when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_thread(self) -> bool:
        """Start the thread if there is none; False where the system gives no more threads."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="cake-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
            atexit.register(self.close)
        return True

    def _run(self) -> None:
        # Only Linux has a niceness per thread; elsewhere this lowers nothing or is refused.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        while (job := self._take()) is not None:
            try:
                self._report(job, self._save(job))
            finally:
                nbytes = job.layout.nbytes
                del job  # and with it the payload, before the bytes count as free
                with self._changed:
                    self._bytes -= nbytes
                    self._changed.notify_all()

    def _take(self) -> SaveJob | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._queue:
                return self._queue.popleft()
            self._thread = None
            atexit.unregister(self.close)
            return None

    def _save(self, job: SaveJob) -> bool:
        try:
            job.payload.await_copy()
            payload = byte_view(job.payload.memory)
            facts = replace(job.facts, checksums=checksums(payload, job.layout))
            self._store.write(facts.key, [encode_header(job.layout, facts), payload], replace=job.overwrite)
        except Exception as error:
            self.tell(error)
            return False
        return True

    def _report(self, job: SaveJob, durable: bool) -> None:
        """Tell whoever offered the job. Were the thread to die of it, every later flush would wait for ever."""
        try:
            job.done(durable)
        except Exception:
            logger.exception("The saving of a chunk could not be reported.")

    def tell(self, error: Exception) -> None:
        """Say why a chunk is not saved: one line for the first fault; a full disk would otherwise print one per chunk."""
        if not self._told:
            self._told = True
            advice = error if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            logger.warning("Chunks are not being saved (generation goes on). %s", advice)


def pack(pieces: Sequence[torch.Tensor], layout: ChunkLayout) -> Slot:
    """Copy a chunk's pieces, wherever they are, into host memory in payload order.

    From a GPU they are on their way when this returns, see `copy_out`. Whoever reads the memory calls `await_copy` before.
    """
    slot = Slot(layout.nbytes, pinned=any(piece.device.type == "cuda" for piece in pieces))
    parts = zip(pieces, slot.memory.split(layout.sizes), strict=True)
    slot.copied_by(copy_out([part.view(piece.dtype).view(piece.shape) for piece, part in parts], pieces))
    return slot
