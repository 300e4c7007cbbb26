"""Loader threads: claim a chunk from the back, read it, check it, put it into place, again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from cake_hf.arithmetic.errors import CorruptChunk
from cake_hf.arithmetic.frontier import Frontier, Outcome
from cake_hf.movers.place import Place, split_payload
from cake_hf.stores.base import Store
from cake_hf.tensors.codec import check_chunk, header_size
from cake_hf.tensors.layout import ChunkLayout

logger = logging.getLogger("cake_hf")

Record = Callable[[str, int, float, float, Outcome], None]


@dataclass(frozen=True)
class LoadJob:
    """What all loader threads of one restore share.

    Attributes:
        store: to read from.
        keys: of the prompt's chunks, in order.
        layout: of a chunk.
        place: where chunks land.
        frontier: the ledger.
        record: called as `record(actor, chunk, start, end, outcome)` after each load that counted.
        clock: monotonic seconds.
        aside: chunks that were loaded into memory of their own, by index, until the main thread puts them into place.
    """

    store: Store
    keys: Sequence[str]
    layout: ChunkLayout
    place: Place
    frontier: Frontier
    record: Record
    clock: Callable[[], float]
    aside: dict[int, torch.Tensor] = field(default_factory=dict)

    def adopt_landed(self) -> None:
        """Put the chunks into place that have arrived aside. Main thread only."""
        for index in self.frontier.take_landed():
            self.place.adopt(index, self.aside.pop(index))


def start_loaders(job: LoadJob, count: int) -> list[threading.Thread]:
    """Start that many loader threads; they end by themselves when there is nothing more to claim.

    A system that gives no more threads is no reason to fail: fewer of them, or none, only leave more to compute.
    """
    threads: list[threading.Thread] = []
    for n in range(count):
        thread = threading.Thread(target=run_loader, args=(job, f"load-{n}"), name=f"cake-load-{n}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning("Only %d of %d loader threads can be started. %s", len(threads), count, error)
            break
        threads.append(thread)
    return threads


def run_loader(job: LoadJob, actor: str) -> None:
    """One loader's life. Its errors are outcomes in the frontier; nothing is raised."""
    header = memoryview(bytearray(header_size(job.layout)))
    while (index := job.frontier.claim()) is not None:
        start = job.clock()
        outcome = _load(job, index, header)
        if job.frontier.settle(index, outcome):
            job.record(actor, index, start, job.clock(), outcome)
        else:
            job.aside.pop(index, None)


def _load(job: LoadJob, index: int, header: memoryview) -> Outcome:
    key = job.keys[index]
    try:
        payload = job.place.aside() if job.frontier.lands_aside(index) else None
        parts = job.place.parts(index) if payload is None else split_payload(payload, job.layout)
        if job.store.read_into(key, [header, *parts]) is None:
            return Outcome.MISSED
        check_chunk(header, parts, key, job.layout)
        if payload is None:
            job.place.commit(index)
        else:
            job.aside[index] = payload
    except CorruptChunk as error:
        logger.warning("A stored chunk is not usable and is computed instead. %s", error)
        return Outcome.CORRUPT
    except Exception as error:
        # Whatever a store's client raises: the prompt must not suffer from it (law 3).
        logger.warning("A stored chunk cannot be read and is computed instead. %s", error)
        return Outcome.ERROR
    return Outcome.LOADED
