"""One log line per kind of fault: a dead disk is reported once, not once per chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cake_hf.errors import CorruptChunk, NewerChunk
from cake_hf.scheduling.ledger import Outcome

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

    def outcome_of(self, load: Callable[[], Outcome]) -> Outcome:
        """Runs a load of a chunk and returns how it ended. Nothing is raised: an error is logged, and is an outcome."""
        try:
            return load()
        except NewerChunk as error:
            self.tell("newer", "A stored chunk is of a later version and is computed instead. %s", error)
            return Outcome.MISSED
        except CorruptChunk as error:
            self.tell("corrupt", "A stored chunk is not usable and is computed instead. %s", error)
            return Outcome.CORRUPT
        except BaseException as error:
            # Whatever a store's client raises, even its own interrupt or panic, must not affect the prompt.
            self.tell(type(error).__name__, "A stored chunk cannot be read and is computed instead. %s", error)
            return Outcome.ERROR
