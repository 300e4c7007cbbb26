"""Locks in a child that `os.fork` made while other threads were at work: those threads will not give them back.

Those threads are not in the child, whatever they were holding. So each lock of the library is a new one there, and what only
those threads could end (a queue, a read under way) is forgotten.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

_renewals: set[weakref.WeakMethod[Callable[[], None]]] = set()


def renewed_in_child(renew: Callable[[], None]) -> None:
    """Call a bound method in each child that is forked while its object lives. Nothing else runs in the child at that time."""
    _renewals.add(weakref.WeakMethod(renew, _renewals.discard))


class Lock:
    """As `threading.Lock`; a new one in a child.

    Who holds it while they fork themselves may give it back in the child.
    """

    def __init__(self) -> None:
        self._lock = self._held = threading.Lock()
        renewed_in_child(self._renew)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock; False if that was not possible within the time."""
        lock = self._lock
        taken = lock.acquire(blocking, timeout)
        if taken:
            self._held = lock
        return taken

    def release(self) -> None:
        """Give the lock back."""
        self._held.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _renew(self) -> None:
        self._lock = threading.Lock()


def _renew_all() -> None:
    for method in list(_renewals):
        renew = method()
        if renew is not None:
            renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
