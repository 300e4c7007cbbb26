"""What an engine believes about the costs of computing and loading a chunk: learnt from earlier prompts, then measured."""

from __future__ import annotations

from collections import deque
from statistics import median

from cake_hf.scheduling.costs import ComputeCost, Costs
from cake_hf.util.forks import Lock

MEASUREMENTS = 5
"""The median of so many counts: one step that was disturbed changes nothing, and a new speed is believed after three."""


class Beliefs:
    """Costs shared by all restores of an engine. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._compute: ComputeCost | None = None
        self._interval: float | None = None
        self._factors: deque[float] = deque(maxlen=MEASUREMENTS)
        self._intervals: deque[float] = deque(maxlen=MEASUREMENTS)

    def start_from(self, costs: Costs) -> None:
        """Takes over costs that were learnt from earlier prompts; what was measured here counts more."""
        with self._lock:
            if self._compute is None:
                self._compute = costs.compute
            if self._interval is None and costs.load is not None:
                self._interval = costs.load.interval

    def saw_chunk(self, index: int, seconds: float) -> None:
        """Records how long chunk `index` of a prompt took to compute."""
        with self._lock:
            if self._compute is None:
                self._compute = ComputeCost(max(0.0, seconds))
            believed = self._compute.seconds(index)
            self._factors.append(seconds / believed if believed > 0 else 1.0)

    def saw_arrival(self, seconds: float) -> None:
        """Records how long after the one before it, or after it began, a load arrived."""
        with self._lock:
            self._intervals.append(seconds)

    def compute_seconds(self, index: int) -> float | None:
        """Returns f of chunk `index` of a prompt; None if nothing is known."""
        with self._lock:
            if self._compute is None:
                return None
            return self._compute.seconds(index) * (median(self._factors) if self._factors else 1.0)

    def load_seconds(self) -> float | None:
        """Returns l, the seconds between two arrivals; None if nothing is known."""
        with self._lock:
            return median(self._intervals) if self._intervals else self._interval
