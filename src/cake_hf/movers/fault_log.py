"""One line per kind of fault: a dead disk has one thing to say, not one per chunk."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("cake_hf")


class FaultLog:
    """The faults of one restore (or of one writer). All threads of it share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def tell(self, kind: str, message: str, error: object) -> None:
        """Log a fault as a warning if it is the first of its kind, for who debugs otherwise.

        Args:
            kind: e.g. an outcome's name.
            message: with one `%s` for the error.
            error: what was raised.
        """
        with self._lock:
            first = kind not in self._told
            self._told.add(kind)
        logger.log(logging.WARNING if first else logging.DEBUG, message, error)
