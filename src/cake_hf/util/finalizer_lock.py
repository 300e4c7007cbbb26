"""A lock for data that finalizers change as well."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from cake_hf.util.forks import Lock


class FinalizerLock:
    """A non-reentrant lock, used as `with lock:`; `lock.soon(call)` makes a call under it and never waits.

    The garbage collector may run a finalizer in any thread at nearly any time, even while that thread holds the lock: waiting
    for the lock there would never end. If the lock is held, its holder therefore makes the call when it releases the lock.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._left: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        self._catch_up()

    def soon(self, call: Callable[[], object]) -> None:
        """Makes a call under the lock: at once, or when the lock is released."""
        self._left.append(call)
        self._catch_up()

    def _catch_up(self) -> None:
        # A thread that queues a call then tries the lock, and a thread that releases it then checks the queue: no call is lost.
        while self._left and self._lock.acquire(blocking=False):
            try:
                with suppress(IndexError):
                    self._left.popleft()()
            finally:
                self._lock.release()
