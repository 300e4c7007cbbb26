"""One log line per kind of fault: a dead disk is reported once, not once per chunk."""

from __future__ import annotations

import logging

logger = logging.getLogger("cake_hf")


class FaultLog:
    """The faults of one restore (or of one writer), shared by all its threads."""

    def __init__(self) -> None:
        self._told: dict[str, object] = {}

    def tell(self, kind: str, message: str, error: object) -> None:
        """Logs a fault as a warning if it is the first of its kind, otherwise at debug level.

        Args:
            kind: e.g. an outcome's name.
            message: with one `%s` for the error.
            error: what was raised.
        """
        mark = object()
        first = self._told.setdefault(kind, mark) is mark  # atomic, so no lock is needed
        logger.log(logging.WARNING if first else logging.DEBUG, message, error)
