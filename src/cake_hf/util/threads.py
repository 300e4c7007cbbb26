"""Starting threads when the system may refuse to create more."""

from __future__ import annotations

import threading


def refusal(thread: threading.Thread) -> RuntimeError | None:
    """Starts a thread; returns the system's error if it refuses. A user's signal handler may raise in here."""
    try:
        thread.start()
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return error
    return None
