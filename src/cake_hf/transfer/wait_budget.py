"""The seconds that one prompt may wait in vain for its store, over all its questions and reads together.

Each of these has a limit of its own. A store that hangs in all of them would cost a prompt the sum of these limits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_current = threading.local()


class WaitBudget:
    """The budget of one prompt. Only waits that end without an answer are charged to it.

    Args:
        seconds: of the whole prompt.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def grant(self, seconds: float) -> float:
        """Returns how many of these seconds may be waited; 0 if nothing more is to be asked."""
        return max(0.0, min(seconds, self._left))

    def spend(self, seconds: float) -> None:
        """Charges a wait that was in vain."""
        self._left -= seconds

    @contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Makes this the budget of what the thread asks meanwhile, unless it has one: then that is shared."""
        if getattr(_current, "budget", None) is not None:
            yield
            return
        _current.budget = self
        try:
            yield
        finally:
            _current.budget = None


def wait_budget() -> WaitBudget:
    """Returns the budget of the prompt that this thread is working on; an unlimited one if there is none."""
    budget: WaitBudget | None = getattr(_current, "budget", None)
    return WaitBudget(math.inf) if budget is None else budget
