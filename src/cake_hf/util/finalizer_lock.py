"""A lock for what finalizers change, too."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from cake_hf.util.forks import Lock


class FinalizerLock:
    """`with turns:` is a lock that is not re-entered; `turns.soon(call)` makes a call under it, and never waits.

    The collector may run a finalizer in any thread at nearly any time, also while that thread holds the lock: to wait for it
    there would be for ever. So where the lock is taken, the call is left to whoever has it, who makes it once they are done.
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
        """Make a call under the lock: at once, or when the lock is given back."""
        self._left.append(call)
        self._catch_up()

    def _catch_up(self) -> None:
        # Whoever leaves a call tries the lock afterwards, whoever gives the lock back looks for calls afterwards: none is lost.
        while self._left and self._lock.acquire(blocking=False):
            try:
                with suppress(IndexError):
                    self._left.popleft()()
            finally:
                self._lock.release()
