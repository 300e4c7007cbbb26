"""Threads and forks: locks that stay usable in a child that `os.fork` created, or in finalizers.

Threads that were running then do not exist in the child and would never release the locks that they held. So each lock of the
library is unlocked in the child, and anything that only those threads could finish (a queue, a read under way) is dropped.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import MethodType
from typing import Any, TypeVar

_renewals: dict[weakref.ref[Any], Callable[[Any], None]] = {}


def renewed_in_child(renew: Callable[[], None]) -> None:
    """Registers a bound method to be called in each child forked while its object lives, before the child runs other code.

    Each object has at most one. `weakref.WeakMethod` would complain on Python 3.12 as the interpreter ends.
    """
    assert isinstance(renew, MethodType)
    _renewals[weakref.ref(renew.__self__, _renewals.pop)] = renew.__func__


_locks: set[weakref.ref[threading.RLock]] = set()


def Lock() -> threading.RLock:  # noqa: N802  # used like the one of `threading`
    """Returns a reentrant lock that is unlocked in a forked child, unless the thread that forks holds it.

    What is done to it there is what Python does to the locks of its own library.
    """
    lock = threading.RLock()
    _locks.add(weakref.ref(lock, _locks.discard))
    return lock


def _is_mine(lock: threading.RLock) -> bool:
    return bool(lock._is_owned())  # type: ignore[attr-defined]  # private, so the stubs leave it out


def _renew_all() -> None:
    for lock in [found for one in list(_locks) if (found := one()) is not None]:
        if not _is_mine(lock):
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # private, too
    for reference, renew in _renewals.copy().items():
        if (owner := reference()) is not None:
            renew(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


def refusal(thread: threading.Thread) -> RuntimeError | None:
    """Starts a thread; returns the system's error if it refuses. A user's signal handler may raise in here."""
    try:
        thread.start()
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return error
    return None


T = TypeVar("T")


class cached_property(functools.cached_property[T]):  # noqa: N801  # named like the decorator that it replaces
    """Works like `functools.cached_property` of Python 3.12 and later, which has no lock.

    Up to Python 3.11 there is a lock, shared by all objects of a class: a child forked while a thread computes a value would
    wait for it for ever. Here, threads that read the property at the same time all compute it; the last result stays.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        super().__init__(compute)
        self.lock = nullcontext()


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
        while self._left and not _is_mine(self._lock) and self._lock.acquire(blocking=False):
            try:
                with suppress(IndexError):
                    self._left.popleft()()
            finally:
                self._lock.release()
