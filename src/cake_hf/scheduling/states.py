"""What the ledger records of a chunk and of its load, and which sides take part."""

from __future__ import annotations

from enum import Enum, StrEnum


class State(Enum):
    """State of one chunk."""

    ABSENT = "absent"  # not in the store: only the main thread can make it
    WAITING = "waiting"  # in the store, unclaimed
    LOADING = "loading"  # claimed by a loader
    LOADED = "loaded"
    FAILED = "failed"  # the load failed or was given up: only the main thread can make it
    COMPUTING = "computing"  # claimed by the main thread
    COMPUTED = "computed"


THERE = (State.LOADED, State.COMPUTED)


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
