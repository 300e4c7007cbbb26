"""Threads and forks: locks that stay usable in a child that `os.fork` created, or in finalizers.

Threads that were running then do not exist in the child and would never release the locks that they held. So each lock of the
library is a new one in the child, and anything that only those threads could finish (a queue, a read under way) is dropped.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar, overload

_renewals: set[weakref.WeakMethod[Callable[[], None]]] = set()


def renewed_in_child(renew: Callable[[], None]) -> None:
    """Registers a bound method to be called in each child forked while its object lives, before the child runs other code."""
    _renewals.add(weakref.WeakMethod(renew, _renewals.discard))


class Lock:
    """A `threading.Lock` that is a new, unlocked one in a forked child.

    A thread that forks while it holds the lock may release it in the child.
    """

    def __init__(self) -> None:
        self._lock = self._held = threading.Lock()
        renewed_in_child(self._renew)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Takes the lock; returns False if that was not possible within the time."""
        lock = self._lock
        taken = lock.acquire(blocking, timeout)
        if taken:
            self._held = lock
        return taken

    def release(self) -> None:
        """Releases the lock."""
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


class cached_property(Generic[T]):  # noqa: N801  # named like the decorator that it replaces
    """Works like `functools.cached_property`, without its lock.

    Up to Python 3.11 that lock is shared by all objects of a class, so a child forked while a thread computes a value would
    wait for it for ever. Here, threads that read the property at the same time all compute it; the last result stays.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> cached_property[T] | T:
        if instance is None:
            return self
        value = instance.__dict__[self._name] = self._compute(instance)
        return value


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
