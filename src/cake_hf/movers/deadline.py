"""Calls that may hang, bounded in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cake_hf.arithmetic.errors import DeadlineExceeded

T = TypeVar("T")


def call_with_deadline(call: Callable[[], T], seconds: float, what: str) -> T:
    """Run a call in a thread of its own and wait for it, but not for ever.

    A call that hangs cannot be ended from outside; its (daemon) thread is left to it.

    Raises:
        DeadlineExceeded: no answer in time.
        Exception: whatever the call raised.
    """
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
        raise DeadlineExceeded(f"The store did not answer ({what}) within {seconds:g} s.")
    if errors:
        raise errors[0]
    return results[0]
