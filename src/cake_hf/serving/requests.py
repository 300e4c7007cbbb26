"""The requests of a manager, from `add_request` to the end of their reports, and the thread that looks them up."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cake_hf.chunks.codec import stored_bytes
from cake_hf.report import Refusal, Report
from cake_hf.restore.session import Session
from cake_hf.scheduling.pace import Pace
from cake_hf.serving.restore import Restore
from cake_hf.transfer.telemetry import observe_request
from cake_hf.util.forks import Lock, refusal

logger = logging.getLogger("cake_hf")

MOST_REPORTS = 8192
"""Reports that are kept, of the requests that came last."""


class Desk:
    """Work that may wait for a store, done in order by one background thread, so that no other thread waits.

    The thread ends when there is nothing to do. If the system provides none, the work is not done.

    Args:
        look_up: finds out what is stored of some restores; must not raise.
        give_up: called with a restore that cannot be looked up.
    """

    def __init__(self, look_up: Callable[[list[Restore]], None], give_up: Callable[[Restore], None]) -> None:
        self._look_up, self._give_up = look_up, give_up
        self._changed = threading.Condition()
        self._waiting: deque[Restore] = deque()
        self._later: deque[Callable[[], Any]] = deque()
        self._open = self._busy = False

    def open(self) -> None:
        """Begins to look up, also what has come before."""
        with self._changed:
            self._open = True
        self._begin()

    def ask(self, restore: Restore) -> None:
        """Queues a restore to be looked up."""
        with self._changed:
            self._waiting.append(restore)
        self._begin()

    def later(self, work: Callable[[], Any]) -> None:
        """Queues work that is done when no restore waits; what it raises is logged."""
        with self._changed:
            self._later.append(work)
        self._begin()

    def wait(self, seconds: float) -> bool:
        """Waits until everything is done; False if it took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def _begin(self) -> None:
        with self._changed:
            if self._busy or not self._has_work():
                return
            self._busy = True
        error = refusal(threading.Thread(target=self._run, name="cake-lookup-serving", daemon=True))
        if error is not None:
            with self._changed:
                self._busy = False
                left, self._waiting = list(self._waiting), deque()
            for restore in left:
                self._give_up(restore)

    def _has_work(self) -> bool:
        return bool(self._later) or (self._open and bool(self._waiting))

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._has_work():
                    self._busy = False
                    self._changed.notify_all()
                    return
                restores = list(self._waiting) if self._open else []
                self._waiting = self._waiting if not restores else deque()
                work = None if restores else self._later.popleft()
            if restores:
                self._look_up(restores)
            elif work is not None:
                try:
                    work()
                except Exception as error:
                    logger.debug("What a request has shown could not be noted: %s", error)


class Requests:
    """All requests that are known, and their reports. Safe to use from several threads.

    Attributes:
        desk: where requests are looked up.
    """

    def __init__(self, session: Session, look_up: Callable[[list[Restore]], None], clock: Callable[[], float]) -> None:
        self._session, self._clock = session, clock
        self._lock = Lock()
        self._known: dict[str, Restore] = {}
        self._reports: dict[str, Report] = {}
        self.desk = Desk(look_up, give_up)

    def open(
        self, request_id: str, tokens: Sequence[int], children: int = 0, *, again: bool = False, kept: bool = False
    ) -> Restore:
        """Begins a request: has its chunks looked up, if it has any. Never waits.

        Args:
            children: requests that are forked from it before its last token.
            again: it is a request of the engine's own making, such as one that starts again since memory ran out; its report
                goes on.
            kept: the engine has kept its KV elsewhere, and brings it back by itself.
        """
        size = self._session.chunk_size
        report = self._reports.get(request_id) if again else None
        report = report or Report(tokens=len(tokens), chunk_size=size)
        # At least one token is left to run; the engine forks before a prompt's last token.
        chunks = max(0, (len(tokens) - 1 - bool(children)) // size)
        restore = Restore(request_id, list(tokens), chunks, self._clock(), report)
        restore.first_token = report.prefill_seconds > 0
        with self._lock:
            if len(self._known) >= MOST_REPORTS:  # the engine refused some before they came to its scheduler
                lost = next((name for name, one in self._known.items() if one.state is None), None)
                self._known.pop(lost or "", None)
            self._known[request_id] = restore
            self._reports.pop(request_id, None)
            self._reports[request_id] = report
            while len(self._reports) > MOST_REPORTS:
                del self._reports[next(iter(self._reports))]
        if chunks and not kept:
            self.desk.ask(restore)
            return restore
        restore.over()
        if not chunks:
            text = f"the prompt has {len(tokens)} tokens, not more than one chunk of {size}"
            report.explain(Refusal("short-request", text))
        return restore

    def known(self, request_id: str) -> Restore | None:
        """Returns a request that has not ended; None if there is none of that id."""
        return self._known.get(request_id)

    def under_way(self) -> list[Restore]:
        """Returns the requests that have not ended."""
        with self._lock:
            return list(self._known.values())

    def drop(self, request_id: str) -> Restore | None:
        """Forgets a request, but not its report."""
        with self._lock:
            return self._known.pop(request_id, None)

    def report(self, request_id: str) -> Report | None:
        """Returns the report of a request; None if it is not known, or no longer."""
        return self._reports.get(request_id)

    def first_token_came(self, restore: Restore) -> None:
        """Notes the first token of a request's answer: its prompt is done. Counting it is left to the desk."""
        restore.first_token = True
        restore.report.prefill_seconds = self._clock() - restore.started
        self.desk.later(partial(self._count, restore))

    def _count(self, restore: Restore) -> None:
        report = restore.report
        observe_request(report)
        if report.restored:
            self._session.bound_store.count(report)
        if restore.namespace and restore.began and not restore.crowded:
            self._learn(restore)

    def _learn(self, restore: Restore) -> None:
        memory, layout = self._session.cost_memory(restore.namespace), self._session.bound_model.layout()
        pace = Pace(memory.costs(), chunks=restore.chunks, threads=self._session.limits.loader_threads)
        for number, at in enumerate(restore.arrivals):
            (pace.loaded if number else pace.loading)(at)
        for index, seconds in restore.steps:
            pace.saw_forward(index, seconds)
        memory.learn(pace, restore.report.timeline, stored_bytes(layout), brought=dict(restore.took))
        compute = memory.costs().compute
        if compute is not None and restore.ended and (restore.report.chunks_loaded or restore.report.chunks_shared):
            computed = sum(compute.seconds(index) for index in range(restore.chunks))
            restore.report.seconds_saved = computed - (restore.ended - restore.began)


NO_THREAD = Refusal("no-thread", "the system provides no thread to look the prompt up")


def give_up(restore: Restore, refusal: Refusal = NO_THREAD) -> None:
    """Lets the engine compute a request that could not be looked up."""
    restore.report.explain(refusal)
    restore.over()
