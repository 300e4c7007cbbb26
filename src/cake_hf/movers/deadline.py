"""Calls that may hang, bounded in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cake_hf.arithmetic.errors import DeadlineExceeded

T = TypeVar("T")


class Late:
    """Calls of one kind that were given up. As long as one of them hangs another one would, too, and cost one thread more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __bool__(self) -> bool:
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            return bool(self._threads)

    def add(self, thread: threading.Thread) -> None:
        """A call was given up that this thread is at."""
        with self._lock:
            self._threads.append(thread)


def call_with_deadline(call: Callable[[], T], seconds: float, what: str, late: Late | None = None) -> T:
    """Run a call in a thread of its own and wait for it, but not for ever.

    A call that hangs cannot be ended from outside; its (daemon) thread is left to it.

    Args:
        call: to run.
        seconds: to wait.
        what: it is about, in a word.
        late: calls that were given up earlier: while there are any, this one is not begun.

    Raises:
        DeadlineExceeded: no answer in time.
        Exception: whatever the call raised.
    """
    if late:
        raise DeadlineExceeded(f"An earlier question ({what}) is still not answered; nothing is asked until it is.")
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"cake-{what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        if late is not None:
            late.add(thread)
        raise DeadlineExceeded(f"The store did not answer ({what}) within {seconds:g} s.")
    if errors:
        raise errors[0]
    return results[0]
