"""Threads, where the system may give no more of them."""

from __future__ import annotations

import threading


def refusal(thread: threading.Thread) -> RuntimeError | None:
    """Start a thread; the system's error where it gives none. What else is raised in here is a signal handler's of the user."""
    try:
        thread.start()
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return error
    return None
