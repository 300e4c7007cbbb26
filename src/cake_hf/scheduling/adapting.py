"""Loads that choose among forms of a chunk, so that a restore is over in time: CacheGen's adaptation at both ends.

Source: CacheGen (Liu et al., SIGCOMM 2024). Its rule, `costs.finest`, is asked at each claim. What computing will have made by
then need not be loaded. Where no form is in time, the coarsest is loaded. Pure arithmetic: no clock, no threads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from cake_hf.scheduling.costs import MAX_SECONDS, Brought, CodecCost, Costs, LoadCost, finest
from cake_hf.scheduling.pace import Pace

LEAST_SECONDS = 1e-9


class Adapting(Pace):
    """The pace of a restore that has a time to keep.

    How late loads are is measured on the bytes that came, whatever their form. Where nothing is known of loads, the first one
    to arrive tells the bandwidth.

    Args:
        costs: as learnt; of raw chunks.
        forms: the forms of each chunk, the finest first.
        chunk_bytes: of a raw chunk.
        deadline: when the first token should be there, by the frontier's clock.
    """

    def __init__(
        self, costs: Costs, *, forms: Sequence[CodecCost], chunk_bytes: float, deadline: float, **beliefs: Any
    ) -> None:
        super().__init__(costs, **beliefs)
        self._forms, self._chunk_bytes, self._deadline = forms, chunk_bytes, deadline
        self._raw: LoadCost | None = None
        self._came: deque[float] = deque(maxlen=self._threads)  # bytes of the last loads
        if costs.load is not None:
            self._believe(costs.load)

    def time_left(self, now: float) -> float:
        """Returns the seconds until all chunks should be there; negative if they are late."""
        return self._deadline - self._following - now

    def arrives(self, nbytes: float, now: float) -> bool:
        """Returns whether another load of so many bytes would be in time, once all others have arrived."""
        if self._load is None:
            return self.time_left(now) > 0
        return self._past(self._load) * replace(self._load, chunk_bytes=nbytes).seconds <= self.time_left(now)

    def loaded(self, now: float, brought: Brought | None = None) -> None:
        super().loaded(now, brought)
        if brought is None:
            return
        self._came.append(brought.nbytes)
        if self._raw is None and self._arrivals:
            bandwidth = brought.nbytes / max(now - self._arrivals[0], LEAST_SECONDS)
            self._believe(LoadCost(0.0, max(1.0, bandwidth), self._chunk_bytes, self._threads))

    def form(self, front: int | None, left: int, now: float) -> int:
        seconds = self.time_left(now)
        if self._raw is None:
            return 0 if seconds > 0 else len(self._forms) - 1
        by_computing = 0 if front is None else self._computed_in(front, left, seconds)
        loads = [form.load(self._raw) for form in self._forms]
        late = max(self._lateness(now), LEAST_SECONDS)
        chosen = finest(loads, max(1, left - by_computing), seconds / late)
        chosen = len(loads) - 1 if chosen is None else chosen
        self._load = loads[chosen]
        return chosen

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        self.form(front, chunk - front + loads, now)
        return super().slack(front, chunk, loads, now)

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        self.form(chunk, loads_left, now)
        return super().worth(chunk, loads_left, now, whole=whole)

    def _believe(self, raw: LoadCost) -> None:
        """Takes on what loading raw chunks costs."""
        self._raw = raw
        self._load = self._forms[0].load(raw)

    def _past(self, load: LoadCost) -> float:
        return super()._past(replace(load, chunk_bytes=fmean(self._came)) if self._came else load)

    def _computed_in(self, front: int, left: int, seconds: float) -> int:
        """Returns how many of the chunks that are left are computed within so many seconds."""
        if self._compute is None:
            return 0
        within = min(seconds, MAX_SECONDS)
        return bisect_right(range(1, left + 1), within, key=lambda count: self._compute_seconds(front, count))
