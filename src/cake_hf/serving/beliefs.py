"""An engine's beliefs about the costs of computing and loading a chunk: learnt from earlier prompts, then measured."""

from __future__ import annotations

from collections import deque
from statistics import linear_regression, mean, median

from cake_hf.scheduling.costs import ComputeCost, Costs
from cake_hf.util.forks import Lock

STEPS = 32
"""Steps that the cost of computing is fitted to: some three prompts' worth, so that a change of speed is soon believed."""

ARRIVALS = 5
"""The median of so many intervals counts: one that was disturbed changes nothing."""


class Beliefs:
    """Costs shared by all restores of an engine. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._learnt: ComputeCost | None = None
        self._fitted: ComputeCost | None = None
        self._interval: float | None = None
        self._steps: deque[tuple[int, float]] = deque(maxlen=STEPS)
        self._intervals: deque[float] = deque(maxlen=ARRIVALS)

    def start_from(self, costs: Costs) -> None:
        """Takes over costs that were learnt from earlier prompts; what was measured here counts more."""
        with self._lock:
            if self._learnt is None:
                self._learnt = costs.compute
            if self._interval is None and costs.load is not None:
                self._interval = costs.load.interval

    def saw_chunk(self, index: int, seconds: float) -> None:
        """Records how long chunk `index` of a prompt took to compute."""
        with self._lock:
            self._steps.append((index, seconds))
            self._fitted = self._fit()

    def saw_arrival(self, seconds: float) -> None:
        """Records how long after the one before it, or after it began, a load arrived."""
        with self._lock:
            self._intervals.append(seconds)

    def compute_seconds(self, index: int) -> float | None:
        """Returns f of chunk `index` of a prompt; None if nothing is known."""
        with self._lock:
            cost = self._fitted or self._learnt
            return None if cost is None else cost.seconds(index)

    def load_seconds(self) -> float | None:
        """Returns l, the seconds between two arrivals; None if nothing is known."""
        with self._lock:
            return median(self._intervals) if self._intervals else self._interval

    def _fit(self) -> ComputeCost:
        """Fits a line to the measured steps; from equal chunks only the level, with the slope that was learnt."""
        indices, seconds = [index for index, _ in self._steps], [took for _, took in self._steps]
        if len(set(indices)) > 2:
            slope, base = linear_regression(indices, seconds)
            if slope >= 0 and base > 0:
                return ComputeCost(base, slope)
        level, known = mean(seconds), self._learnt
        believed = mean(known.seconds(index) for index in indices) if known is not None else 0.0
        if known is None or believed <= 0:
            return ComputeCost(max(0.0, level))
        return ComputeCost(known.base * level / believed, known.slope * level / believed)
