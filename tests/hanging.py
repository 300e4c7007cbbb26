"""Reads that hang, and deadlines that end without being waited for: no test then needs a deadline that is short."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

from cake_hf.restore import pacing as pace
from cake_hf.scheduling.frontier import Frontier
from cake_hf.testing import FaultStore
from waiting import PATIENCE, loaders


class Leaps(threading.Condition):
    """What a frontier waits on, and its clock, which leaps beyond every deadline where nothing can come any more.

    Until then it is everybody's clock, so that a slow machine is late for a deadline as long as `PATIENCE` only.
    """

    def __init__(self, nothing_comes: Callable[[], bool]) -> None:
        super().__init__()
        self._nothing_comes = nothing_comes
        self._leapt = 0.0

    def clock(self) -> float:
        return time.monotonic() + self._leapt

    def wait(self, timeout: float | None = None) -> bool:
        if self._nothing_comes():
            self._leapt += PATIENCE
            return False
        return super().wait(0.001)  # there is no signal when a read hangs, or a loader ends


@contextmanager
def no_waiting_when(nothing_comes: Callable[[], bool]) -> Iterator[None]:
    """While it lasts, a prompt that waits for loads finds their deadlines over once `nothing_comes()`."""
    leaps = Leaps(nothing_comes)
    with mock.patch.object(pace, "Frontier", partial(Frontier, clock=leaps.clock, changed=leaps)):
        yield


@contextmanager
def no_waiting_for(store: FaultStore) -> Iterator[None]:
    """While it lasts, the deadlines of this store's stalled reads are over once no other loader is left.

    So exactly the stalled loads are given up, and what no loader came to. To be left before the store is released.
    """

    def nothing_comes() -> bool:
        return len(loaders()) == sum(fault == "stall" for _, fault in store.injected)

    with no_waiting_when(nothing_comes):
        yield
