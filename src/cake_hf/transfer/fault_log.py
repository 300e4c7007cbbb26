"""One line per kind of fault: a dead disk has one thing to say, not one per chunk."""

from __future__ import annotations

import logging

logger = logging.getLogger("cake_hf")


class FaultLog:
    """The faults of one restore (or of one writer). All threads of it share one."""

    def __init__(self) -> None:
        self._told: dict[str, object] = {}

    def tell(self, kind: str, message: str, error: object) -> None:
        """Log a fault as a warning if it is the first of its kind, for who debugs otherwise.

        Args:
            kind: e.g. an outcome's name.
            message: with one `%s` for the error.
            error: what was raised.
        """
        mark = object()
        first = self._told.setdefault(kind, mark) is mark  # in one step, so that no lock is needed
        logger.log(logging.WARNING if first else logging.DEBUG, message, error)
