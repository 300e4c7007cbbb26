"""The second pass over chunks of which only the bases have come: their refinements, until the time is over.

When the two sides have met, some chunks may be rounded, since all of them would not have come in time. The time that is left is
used to read refinements, those of the first chunks first. A refined chunk is exact.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from cake_hf.chunks.lossless import refine
from cake_hf.limits import Limits
from cake_hf.restore.pacing import HurriedPace
from cake_hf.transfer.encoded_ranges import read_refinements
from cake_hf.transfer.loader import LoadJob
from cake_hf.transfer.single_reads import ReadBeside
from cake_hf.util.interrupts import faults_suppressed

REFINE, REFINED = "refine", "refined"
"""Actor and outcome in the timeline."""


class Refining:
    """The second pass of one restore, after its sides have met.

    Args:
        job: the job of the loader threads, which have ended.
        pace: knows how much time is left.
        limits: the limits of the session: as many reads are under way as in the first pass.
        pieces: returns a chunk's pieces `[1, tokens, heads, head_dim]` in the layers.
    """

    def __init__(
        self, job: LoadJob, pace: HurriedPace, limits: Limits, pieces: Callable[[int], Sequence[torch.Tensor]]
    ) -> None:
        self._job = job
        self._pace = pace
        self._limits = limits
        self._pieces = pieces
        self._waiting = deque(job.frontier.rounded())
        self._under_way: deque[tuple[int, ReadBeside[memoryview]]] = deque()

    def run(self) -> None:
        """Refines chunks until all are exact, or another one would not be in time."""
        while self._begin_reads():
            index, read = self._under_way.popleft()
            begin = time.monotonic()
            refinements = read.wait(min(self._limits.read_timeout, max(0.0, self._pace.time_left(begin))))
            if not read.is_over():
                read.leave()
                break
            if refinements is not None:
                with faults_suppressed(MemoryError, RuntimeError):  # without memory for it, the chunk stays as it is
                    self._refine(index, refinements)
                    self._job.record(REFINE, index, begin, time.monotonic(), REFINED)
        for _, read in self._under_way:
            read.leave()

    def _begin_reads(self) -> bool:
        """Starts as many reads as may be under way and would be in time; returns whether any is under way."""
        while self._waiting and len(self._under_way) < self._limits.loader_threads:
            index = self._waiting.popleft()
            together = (index, *(under_way for under_way, _ in self._under_way))
            nbytes = sum(sum(self._job.rounded[one].sizes.refinements) for one in together)
            if not self._job.frontier.ask(partial(self._pace.arrives, nbytes, time.monotonic())):
                self._waiting.clear()
                break
            layout, wanted = self._job.place.layout_of(index), self._job.place.wanted(index)
            read = partial(read_refinements, self._job.store, layout, self._job.rounded[index], wanted)
            slot = self._job.sharing.begin_beside(self._limits.loader_threads, self._limits.read_timeout)
            self._under_way.append((index, ReadBeside(read, "refinement", slot)))
        return bool(self._under_way)

    def _refine(self, index: int, refinements: memoryview) -> None:
        sizes = self._job.rounded[index].sizes.refinements
        pieces = self._pieces(index)
        parts = torch.frombuffer(refinements, dtype=torch.uint8).split(list(sizes[: len(pieces)]))
        with torch.inference_mode():
            for piece, part in zip(pieces, parts, strict=True):
                if part.numel():
                    refine(piece, part.to(piece.device))
        self._job.frontier.refined(index)
