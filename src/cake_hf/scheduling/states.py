"""What the ledger records of a chunk and of its load, which sides take part, and what it asks of the rules."""

from __future__ import annotations

import math
from enum import Enum, StrEnum

from cake_hf.scheduling.costs import Brought


class State(Enum):
    """State of one chunk."""

    ABSENT = "absent"  # not in the store: only the main thread can make it
    WAITING = "waiting"  # in the store, unclaimed
    LOADING = "loading"  # claimed by a loader
    LOADED = "loaded"
    FAILED = "failed"  # the load failed or was given up: only the main thread can make it
    COMPUTING = "computing"  # claimed by the main thread
    COMPUTED = "computed"


class Outcome(Enum):
    """How a load ended."""

    LOADED = "loaded"
    MISSED = "missed"  # listed by the prefix match, gone now
    CORRUPT = "corrupt"
    ERROR = "error"
    LATE = "late"


class Strategy(StrEnum):
    """Which sides take part. BOTH is Cake; the other two are the single methods that it is compared with."""

    BOTH = "both"
    COMPUTE = "compute"
    LOAD = "load"

    @classmethod
    def _missing_(cls, value: object) -> Strategy:
        raise ValueError(f"strategy {value!r} is unknown; choose one of {', '.join(cls)}.")


class Judge:
    """Knows what computing and loading cost (see `pace.Pace`), and is notified of events.

    This base class always computes and contests nothing.

    All methods are called with the frontier's lock held; `now` is a time of the frontier's clock.
    """

    def loading(self, now: float) -> None:
        """Notes that a load has started."""

    def loaded(self, now: float, brought: Brought | None = None) -> None:
        """Notes that a load has arrived, and what it brought if that is known."""

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

    def form(self, front: int | None, left: int, now: float) -> int:
        """Returns the form in which a chunk is to be loaded: 0 for the finest, in which it is stored.

        Args:
            front: the first chunk that is not there; None if the main thread computes only what cannot be loaded.
            left: number of remaining loads, including this one.
            now: by the clock.
        """
        return 0

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
