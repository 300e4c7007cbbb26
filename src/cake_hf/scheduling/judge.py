"""What the ledger asks of the rules, which know what computing and loading cost (`pace.Pace`)."""

from __future__ import annotations

import math


class Judge:
    """Decides between computing and waiting, and is notified of events. This base class always computes and contests nothing.

    All methods are called with the frontier's lock held; `now` is a time of the frontier's clock.
    """

    def loading(self, now: float) -> None:
        """Notes that a load has started."""

    def loaded(self, now: float) -> None:
        """Notes that a load has arrived."""

    def paused(self) -> None:
        """Notes that no load is under way because none is worth starting."""

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        """Returns how many times as long as believed a load may take and still arrive before its chunk is computed.

        At least 1 if a cost is not known; infinite if nothing is to be contested.

        Args:
            front: the first chunk that is not there, at which the main thread is.
            chunk: to be loaded, at the front or after it.
            loads: number of loads that will then be under way, including this one.
            now: by the clock.
        """
        return math.inf

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        """Returns whether to compute a chunk that could be loaded, rather than to wait for the remaining loads.

        Args:
            chunk: the chunk at the front.
            loads_left: number of remaining loads, including this chunk.
            now: by the clock.
            whole: whether the chunk's load is under way and does not deliver it layer by layer.
        """
        return True

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        """Returns whether to compute the chunk although that is not worth it: see `Frontier.is_trial`."""
        return False
