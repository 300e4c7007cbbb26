"""Threads, where the system may give no more of them."""

from __future__ import annotations

import threading


def refusal(thread: threading.Thread) -> RuntimeError | None:
    """Starts a thread; returns the system's error if it gives none. A signal handler of the user's may raise in here."""
    try:
        thread.start()
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return error
    return None
