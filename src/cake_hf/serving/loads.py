"""The loads of an engine: threads that claim chunks of all its restores, read and check them, and copy them to their blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cake_hf.chunks.codec import header_size
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.stored_forms import EncodedPieces
from cake_hf.restore.bound_store import BoundStore
from cake_hf.scheduling.frontier import Outcome
from cake_hf.scheduling.step_sharing import next_load
from cake_hf.serving.beliefs import Beliefs
from cake_hf.serving.ledger import Ledger, Load
from cake_hf.serving.restore import Restore
from cake_hf.serving.windows import Windows
from cake_hf.transfer.chunk_reads import ChunkReader
from cake_hf.transfer.copy_streams import SlotRing, let_copies_out_end
from cake_hf.transfer.landing import split_payload
from cake_hf.transfer.single_flight import ReadSlot
from cake_hf.transfer.telemetry import FaultLog
from cake_hf.util.forks import Lock, refusal

logger = logging.getLogger("cake_hf")

Blocks = Callable[[Restore, int], Sequence[torch.Tensor]]
"""Returns the memory of a chunk of a restore: per block `[pieces, bytes]` uint8."""


class _Slot:
    """The memory of a chunk that is being read.

    Attributes:
        parts: the chunk's pieces.
        staged: whether the memory is the read's own.
    """

    staged = True

    def __init__(self, parts: list[memoryview]) -> None:
        self.parts = parts

    def commit(self, end: int) -> None:
        """Does nothing: the chunk is copied to its blocks once all of it is there."""

    def decode(self, pieces: EncodedPieces) -> bool:
        """Returns False, so that the host decodes: it is not known yet where the chunk goes."""
        return False


class Loaders:
    """The loader threads of one engine. They end when there is nothing to claim, and are started again.

    Every read goes into memory of its own, is checked there, and is copied to the request's blocks only if it is still wanted.
    So no read, however late, can write to blocks that have become another request's.

    Args:
        blocks: see `Blocks`.
        windows: the windows of the engine's requests.
        beliefs: about costs.
        device: where the blocks are.
        wake: called after each load.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        bound: BoundStore,
        layout: ChunkLayout,
        blocks: Blocks,
        windows: Windows,
        beliefs: Beliefs,
        device: torch.device,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bound, self._layout, self._blocks, self._beliefs = bound, layout, blocks, beliefs
        self._windows = windows
        self._wake, self._clock = wake, clock
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ring = SlotRing(layout.nbytes, bound.limits.loader_threads, pinned=self._stream is not None)
        self._restores: tuple[Restore, ...] = ()
        self._lock = Lock()
        self._threads = 0
        self._reads: dict[Load, ReadSlot] = {}
        self._last_arrival = 0.0
        self.faults = FaultLog()

    def serve(self, restores: Sequence[Restore]) -> None:
        """Loads for these restores from now on, oldest first. Never waits."""
        self._restores = tuple(restores)
        self._bound.sharing.wake()
        self._start()

    def leave(self, load: Load) -> None:
        """Abandons a read that is late, and has another thread take its place."""
        with self._lock:
            slot = self._reads.pop(load, None)
            self._threads -= slot is not None
        if slot is not None:
            slot.leave()
            self._start()

    def stop(self) -> None:
        """Loads nothing any more. Reads under way are left to their threads, which keep nothing of the engine alive."""
        self._restores, self._blocks = (), _nowhere
        with self._lock:
            reads = list(self._reads)
        for load in reads:
            self.leave(load)
        self._bound.sharing.wake()

    def new_reader(self) -> ChunkReader:
        """Returns what reads chunks, for one thread."""
        return ChunkReader(self._bound.store, self._layout, self._bound.sharing.forms, encodes=False)

    def _start(self) -> None:
        while self._has_claims():
            with self._lock:
                if self._threads >= self._bound.limits.loader_threads:
                    return
                self._threads += 1
            error = refusal(threading.Thread(target=self._run, name="cake-load-serving", daemon=True))
            if error is not None:  # fewer threads, or none, mean that more is computed
                with self._lock:
                    self._threads -= 1
                    none_left = not self._threads
                if none_left:
                    self._close_all()
                return

    def _has_claims(self) -> bool:
        return any(_ledger(restore).next_load() is not None for restore in self._restores)

    def _run(self) -> None:
        try:
            if not self._load_all():
                return  # a read was abandoned, and another thread has taken this one's place
        except Exception as error:
            self.faults.tell(
                type(error).__name__, "A stored chunk cannot be read and is computed instead. %s", repr(error)
            )
            self._close_all()
        with self._lock:
            self._threads -= 1
        self._start()  # something may have come since

    def _load_all(self) -> bool:
        """Loads until there is nothing to claim, or nothing can be loaded; False if this thread's read was abandoned."""
        sharing, limits = self._bound.sharing, self._bound.limits
        reader = self.new_reader()
        while True:
            slot = sharing.begin_read(limits.loader_threads, lambda: not self._has_claims(), limits.read_timeout)
            if slot is None:
                break
            try:
                claimed = self._claim()
                if claimed is not None and not self._bring(*claimed, reader, slot):
                    return False
            finally:
                slot.release()
        if (hanging := sharing.hanging()) >= limits.loader_threads and self._has_claims():
            self.faults.tell("hanging", "Nothing is loaded as long as reads of earlier prompts hang: %s.", hanging)
            self._close_all()
        return True

    def _claim(self) -> tuple[Restore, Load] | None:
        while True:
            open_ones = [(one, chunk) for one in self._restores if (chunk := _ledger(one).next_load()) is not None]
            if not open_ones:
                return None
            saved = [
                (self._beliefs.compute_seconds(chunk) or 0.0, _ledger(one).loads_under_way())
                for one, chunk in open_ones
            ]
            restore = open_ones[next_load(saved)][0]
            load = _ledger(restore).claim()
            if load is not None:
                return restore, load

    def _bring(self, restore: Restore, load: Load, reader: ChunkReader, slot: ReadSlot) -> bool:
        """Brings a chunk; returns False if the read was abandoned meanwhile."""
        with self._lock:
            self._reads[load] = slot
        outcome = self.faults.outcome_of(lambda: self._load(restore, load, reader))
        with self._lock:
            mine = self._reads.pop(load, None) is not None
        self._count(restore, load, outcome)
        self._wake()
        return mine

    def _count(self, restore: Restore, load: Load, outcome: Outcome) -> None:
        ended, report = self._clock(), restore.report
        if outcome is not Outcome.LOADED:
            restore.outcomes[load.chunk] = outcome
        if not _ledger(restore).settle(load, outcome):
            if outcome is Outcome.LOADED:
                restore.record("load", load.chunk, load.begun, ended, "superseded")
            return
        restore.record("load", load.chunk, load.begun, ended, outcome.value)
        if outcome is Outcome.LOADED:
            report.chunks_loaded += 1
            report.bytes_loaded += sum(self._layout.sizes[: self._wanted(restore, load.chunk)])
            restore.arrivals.append(ended)
            with self._lock:
                since, self._last_arrival = max(self._last_arrival, load.begun), ended
            brings_windows = load.chunk in _ledger(restore).windows.chunks
            self._beliefs.saw_arrival((ended - since) / (_ledger(restore).windows.weight if brings_windows else 1.0))
        elif outcome is Outcome.MISSED:
            report.chunks_missed += 1
        else:
            report.chunks_failed += 1

    def _load(self, restore: Restore, load: Load, reader: ChunkReader) -> Outcome:
        memory = self._ring.take()
        try:
            count, whole = self._wanted(restore, load.chunk), self._layout.ranges(1)
            slot = _Slot(split_payload(memory.memory, self._layout)[:count])
            if not reader.read(restore.keys[load.chunk], self._layout, slot, whole, lambda _: None, lambda: True):
                return Outcome.MISSED
            raw_bytes = header_size(self._layout) + sum(self._layout.sizes[:count])
            restore.took[load.chunk] = reader.brought(raw_bytes)
            if _ledger(restore).land(load):
                full = sum(self._layout.sizes[: self._layout.everywhere])
                self._copy(memory.memory[:full], self._blocks(restore, load.chunk))
                if count > self._layout.everywhere:
                    self._windows.keep(restore, load.chunk, memory.memory)
            return Outcome.LOADED
        finally:
            self._ring.give_back(memory)

    def _wanted(self, restore: Restore, chunk: int) -> int:
        """Returns how many of a chunk's pieces are loaded: all, or those before the windows'."""
        return len(self._layout.pieces) if chunk in _ledger(restore).windows.chunks else self._layout.everywhere

    def _copy(self, payload: torch.Tensor, blocks: Sequence[torch.Tensor]) -> None:
        if not blocks:
            return
        source = payload.view(blocks[0].shape[0], len(blocks), -1)
        if self._stream is None:
            bytes_of, whole = np.copyto, source.numpy()
            for number, block in enumerate(blocks):
                bytes_of(block.detach().numpy(), whole[:, number])
            return
        with torch.inference_mode(), torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            let_copies_out_end()  # the blocks may have been another request's, whose chunks are still being saved
            for number, block in enumerate(blocks):
                block.copy_(source[:, number], non_blocking=True)
        self._stream.synchronize()

    def _close_all(self) -> None:
        for restore in self._restores:
            _ledger(restore).close_loading()
        self._wake()


def _nowhere(restore: Restore, chunk: int) -> Sequence[torch.Tensor]:
    raise RuntimeError("the engine is gone")


def _ledger(restore: Restore) -> Ledger:
    assert restore.ledger is not None
    return restore.ledger
