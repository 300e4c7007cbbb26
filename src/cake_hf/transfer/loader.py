"""Loader threads: each repeatedly claims a chunk from the back, reads it, checks it and commits or stages it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from cake_hf.chunks.codec import header_size
from cake_hf.chunks.encoded_header import EncodedMetadata
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.scheduling.costs import Brought
from cake_hf.scheduling.frontier import Frontier, Outcome
from cake_hf.scheduling.layer_gate import LayerGate
from cake_hf.stores.base import Store, total_bytes
from cake_hf.transfer.chunk_reads import ChunkReader
from cake_hf.transfer.landing import Landing, Place
from cake_hf.transfer.single_flight import Flight, ReadSlot, Sharing
from cake_hf.transfer.telemetry import FaultLog
from cake_hf.util.forks import refusal

logger = logging.getLogger("cake_hf")

Record = Callable[[str, int, float, float, str], None]

SHARED = "shared"
"""Outcome in the timeline for a chunk that came from a concurrent prompt."""

SUPERSEDED = "superseded"
"""Outcome in the timeline for a load that arrived when it was no longer waited for. It still measures how long loads take."""


@dataclass
class LoadJob:
    """State shared by all loader threads of one restore.

    Attributes:
        store: the store to read from.
        keys: the keys of the prompt's chunks, in order.
        place: where chunks land.
        frontier: the ledger.
        record: called as `record(actor, chunk, start, end, outcome)` after each load that counted or was superseded.
        clock: monotonic seconds.
        sharing: the state shared with the other restores of this process.
        most_reads: maximum number of reads under way, including those of other restores.
        patience: seconds to wait for a chunk that another restore loads or computes.
        gate: where layers of the last loads are waited for; None if all chunks are read whole.
        staged: staged chunks, including those still being loaded, by index, until the main thread commits them.
        shared: chunks that came from another restore.
        encodes: whether the cache writes encoded chunks, so that such are expected.
        lossy: whether its codec is lossy.
        took: what was brought for each chunk that was read.
        rounded: the metadata of each chunk of which only the bases were read.
        faults: the faults of all loads.
    """

    store: Store
    keys: Sequence[str]
    layout: ChunkLayout
    place: Place
    frontier: Frontier
    record: Record
    clock: Callable[[], float]
    sharing: Sharing = field(default_factory=Sharing)
    most_reads: int = 2**31
    patience: float = 10.0
    gate: LayerGate | None = None
    staged: dict[int, Landing] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)
    encodes: bool = False
    lossy: bool = False
    took: dict[int, Brought] = field(default_factory=dict)
    rounded: dict[int, EncodedMetadata] = field(default_factory=dict)
    faults: FaultLog = field(default_factory=FaultLog)
    _slots: dict[str, ReadSlot] = field(default_factory=dict)
    _landings: dict[int, Landing] = field(default_factory=dict)
    _over: bool = False

    def commit_staged(self) -> None:
        """Commits the staged chunks that have arrived. Main thread only."""
        for index in self.frontier.take_staged():
            landing = self.staged.pop(index)
            landing.commit_parts(len(landing.parts))
            landing.release()

    def commit_layer(self, layer: int, chunks: Sequence[int]) -> None:
        """Commits this layer, and those before it, of chunks that have delivered it so far. Main thread only.

        If a load fails meanwhile, the part of this layer that it delivered was good; its memory is not reused (see `_bring`).
        """
        for index in chunks:
            landing = self.staged.get(index)
            if landing is not None:
                landing.commit_parts(self.layout.ends[layer])
        self.commit_staged()

    def drop_late(self) -> None:
        """Lets loads that were given up bring nothing more. A read that goes directly into the buffers still writes there.

        Main thread only, after everything that was staged has been committed.
        """
        for landing in list(self._landings.values()):
            landing.let_go()

    def let_go(self) -> None:
        """Ends the restore: waiting loaders end, and hanging reads no longer count as under way.

        A hanging read keeps this job alive. The job therefore drops the cache, and all memory except where that read lands.
        """
        self.frontier.end()
        self.sharing.abandon(self)
        self.sharing.wake()
        for slot in list(self._slots.values()):
            slot.leave()
        self._over = True
        for landing in list(self._landings.values()):
            landing.let_go()
        self.staged.clear()
        self.place.let_go()

    def lands(self, index: int) -> Landing:
        """Returns the landing for a loader's chunk. If the load was given up meanwhile, it lands nowhere."""
        landing = self._landings[index] = self.place.landing(index, staged=self.frontier.is_staged(index))
        if landing.staged:
            self.staged[index] = landing
        if self._over or not self.frontier.is_wanted(index):
            landing.let_go()
            self.staged.pop(index, None)
        return landing


def start_loaders(job: LoadJob, count: int) -> list[threading.Thread]:
    """Starts `count` loader threads; they end by themselves when there is nothing more to claim.

    If the system provides no more threads, that is no failure: with fewer threads, or none, more is computed.
    """
    threads: list[threading.Thread] = []
    for n in range(count):
        thread = threading.Thread(target=run_loader, args=(job, f"load-{n}"), name=f"cake-load-{n}", daemon=True)
        if (error := refusal(thread)) is not None:
            logger.warning("Only %d of %d loader threads can be started. %s", len(threads), count, error)
            break
        threads.append(thread)
    return threads


def run_loader(job: LoadJob, actor: str) -> None:
    """Runs one loader. Its errors become outcomes in the frontier; nothing is raised."""
    reader = ChunkReader(
        job.store,
        job.layout,
        job.sharing.forms,
        encodes=job.encodes,
        lossy=job.lossy,
        pinned=job.place.decodes,
        clock=job.clock,
    )

    def has_no_claims() -> bool:
        return not job.frontier.has_claims()

    while job.frontier.await_claim():
        slot = job.sharing.begin_read(job.most_reads, has_no_claims, job.patience)
        if slot is None:
            if _is_refused(job):
                return
            continue
        job._slots[actor] = slot
        try:
            index = job.frontier.claim()
            if index is not None:
                _bring(job, actor, index, reader, slot)
        finally:
            slot.release()


def _is_refused(job: LoadJob) -> bool:
    """Returns whether nothing may be read as long as reads hang, and has the main thread compute everything then."""
    hanging = job.sharing.hanging()
    if hanging < job.most_reads or not job.frontier.has_claims():
        return False
    job.faults.tell("hanging", "Nothing is loaded as long as reads of earlier prompts hang: %s.", hanging)
    job.frontier.close()
    return True


def _bring(job: LoadJob, actor: str, index: int, reader: ChunkReader, slot: ReadSlot) -> None:
    start = job.clock()
    landing: Landing | None = None

    def load() -> Outcome:
        nonlocal landing
        landing = job.lands(index)
        return _load(job, index, landing, reader, slot)

    outcome = job.faults.outcome_of(load)
    counts = job.frontier.settle(index, outcome, job.took.get(index))
    job._landings.pop(index, None)
    if counts:
        job.record(actor, index, start, job.clock(), SHARED if index in job.shared else outcome.value)
    elif outcome is Outcome.LOADED and index not in job.shared and not job._over:
        job.record(actor, index, start, job.clock(), SUPERSEDED)
    if landing is None or (counts and landing.staged and outcome is Outcome.LOADED):
        return
    job.staged.pop(index, None)
    if not landing.staged:
        landing.release()
    # Staged memory is left to the garbage collector: the main thread may be committing a layer from it just now.


def _load(job: LoadJob, index: int, landing: Landing, reader: ChunkReader, slot: ReadSlot) -> Outcome:
    if job.frontier.form(index):  # other prompts may want exact KV, and this one cannot wait for theirs
        return _read(job, index, landing, reader, bases_alone=True)
    # A partial load gets a flight of its own: the followers of the chunk's flight may want all pieces.
    whole = len(landing.parts) == len(job.layout.pieces)
    flight = job.keys[index] if whole else f"{job.keys[index]}, first {len(landing.parts)} pieces"
    with job.sharing.flight(flight, job, computes=False) as plan:
        if plan.followed is not None:
            slot.release()  # another restore does the read
            return _copy(job, index, landing, plan.followed)
        outcome = _read(job, index, landing, reader, bases_alone=False)
        if outcome is Outcome.LOADED:
            plan.payload = landing.payload
        return outcome


def _read(job: LoadJob, index: int, landing: Landing, reader: ChunkReader, *, bases_alone: bool) -> Outcome:
    gate, layout = job.gate, job.place.layout_of(index)
    ranges = job.layout.ranges(1 if gate is None else gate.ranges_of(index))
    landed = _nothing if gate is None else partial(gate.landed, index)
    wanted = partial(job.frontier.is_wanted, index)
    if not reader.read(job.keys[index], layout, landing, ranges, landed, wanted, bases_alone=bases_alone):
        return Outcome.MISSED
    raw_bytes = header_size(layout) + total_bytes(landing.parts)
    job.took[index] = reader.brought(raw_bytes)
    if reader.rounded is not None:
        job.rounded[index] = reader.rounded
    return Outcome.LOADED


def _copy(job: LoadJob, index: int, landing: Landing, flight: Flight) -> Outcome:
    """Copies a chunk that another restore makes."""
    if not flight.wait(job.patience):
        return Outcome.LATE
    if flight.payload is None:
        return Outcome.ERROR
    _fill(landing, flight.payload)
    job.shared.add(index)
    return Outcome.LOADED


def _fill(landing: Landing, payload: torch.Tensor) -> None:
    """Copies a whole chunk, `[nbytes]` uint8 on the host, into a landing and commits it."""
    offset, source = 0, payload.numpy()
    for part in landing.parts:
        np.copyto(np.frombuffer(part, np.uint8), source[offset : offset + part.nbytes])
        offset += part.nbytes
    landing.commit(len(landing.parts))


def _nothing(layers: int) -> None:
    """Does nothing when layers have landed."""
