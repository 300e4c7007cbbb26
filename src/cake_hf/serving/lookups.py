"""Finds out in a thread of its own which chunks of requests are stored: all that have come meanwhile, in one question."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from cake_hf.serving.restore import Restore
from cake_hf.util.forks import refusal

logger = logging.getLogger("cake_hf")


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
