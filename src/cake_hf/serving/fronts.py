"""Which restore's front gets a step, and when it leaves the step to the other requests: `scheduling.step_sharing`, applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Strategy
from cake_hf.scheduling.step_sharing import (
    LATE,
    StallBudget,
    Traffic,
    first_front,
    holds_back,
    is_worth_computing,
    remaining_seconds,
    yields,
)
from cake_hf.serving.beliefs import Beliefs
from cake_hf.serving.ledger import Chunk
from cake_hf.serving.restore import Restore
from cake_hf.transfer.telemetry import observe_step

UNKNOWN = 0.25
"""Seconds that a chunk is taken to need as long as none has been measured."""


@dataclass(frozen=True)
class Front:
    """The front of a restore that could go on.

    Attributes:
        restore: whose front it is.
        compute: f.
        load: l; None if nothing of the restore is loaded any more.
        remaining: R.
        waited: seconds since it could have gone on.
    """

    restore: Restore
    compute: float
    load: float | None
    remaining: float
    waited: float


class Fronts:
    """The decisions of one engine.

    Attributes:
        loading: number of restores that share the path to the store.
        decoding: whether any request is decoding.
        traffic: the requests that come to the engine.
    """

    def __init__(self, session: Session, beliefs: Beliefs, stall: float) -> None:
        self._session, self._beliefs = session, beliefs
        self._stall = StallBudget(stall)
        self._stall_share = stall
        self.loading = 1
        self.decoding = False
        self.traffic = Traffic()

    def may_compute(self, restore: Restore, at: Chunk, now: float) -> bool:
        """Returns whether the chunk at a front should be computed, although it may also come from the store."""
        ledger = restore.ledger
        assert ledger is not None
        if at is Chunk.ABSENT:
            return True
        if at is Chunk.LANDING or self._session.strategy is not Strategy.BOTH:
            return False
        compute = sum(map(self._compute, range(ledger.front, ledger.missing + 1)))
        load = self._load()
        left, idle = ledger.loads_left(), ledger.idle(now)
        if load is None:
            return at is Chunk.STORED or idle * LATE > compute
        waiting = left, load, idle, self._session.limits.loader_threads
        delay = self.traffic.delay(compute, now) + (self._stall.delay(compute) if self.decoding else 0.0)
        return is_worth_computing(compute, *waiting, delay)

    def front(self, restore: Restore, now: float) -> Front:
        """Returns what is to be known of a front for `choose`."""
        ledger = restore.ledger
        assert ledger is not None
        chunks, loads = ledger.left()
        compute = [self._compute(index) for index in chunks]
        known = self._load()
        load = (compute[0] if known is None else known) if any(loads) else None
        remaining = remaining_seconds(compute, loads, load or 0.0)
        waited = 0.0 if restore.ready_since is None else now - restore.ready_since
        return Front(restore, compute[0], load, remaining, waited)

    def choose(self, fronts: Sequence[Front], tokens: int, requests: int) -> tuple[Front, bool]:
        """Returns the front whose turn it is among the fronts, and whether it gets the next step.

        Args:
            fronts: that could go on; not empty.
            tokens: of the other requests' prompts that wait to be computed.
            requests: their number.
        """
        front = fronts[first_front([(one.remaining, one.waited) for one in fronts])]
        queued = tokens * self._compute(0) / self._session.chunk_size
        turn = not yields(front.compute, front.load, front.remaining, queued, requests, front.waited)
        if not turn:
            observe_step("yielded")
        if not self.decoding:
            self._stall = StallBudget(self._stall_share)
            return front, turn
        if turn := turn and self._stall.allows():
            self._stall.spend()
        else:
            self._stall.earn()
        return front, turn

    def holds_back(self, restore: Restore, tokens: int, requests: int, now: float) -> bool:
        """Returns whether a request whose chunks are all there stays out of the others' steps for now.

        Args:
            tokens: of the other requests' prompts that wait to be computed.
            requests: their number.
            now: monotonic seconds.
        """
        first, chunks = self._compute(0), tokens / self._session.chunk_size
        dearer = max(0.0, self._compute(restore.chunks) - first)
        return holds_back(chunks * first, requests, chunks * dearer, now - restore.ended)

    def _load(self) -> float | None:
        """Returns l, as one restore among several sees it: each gets its part of the arrivals."""
        seconds = self._beliefs.load_seconds()
        return None if seconds is None else seconds * max(1, self.loading)

    def _compute(self, index: int) -> float:
        seconds = self._beliefs.compute_seconds(index)
        return UNKNOWN if seconds is None else seconds
