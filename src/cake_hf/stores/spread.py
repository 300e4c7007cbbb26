"""Learns over how many requests a value is best read: many if connections are slow, few if the server is."""

from __future__ import annotations

from cake_hf.util.forks import Lock

NEW_WEIGHT = 0.3
"""Weight of the newest read in the smoothed pace of the best number of requests."""

FORGETTING = 0.99
"""Factor on a pace each time another number is chosen, so that it is tried again, the later the slower it was."""


class Spread:
    """Learns from the reads of one store whether half or twice as many requests are faster. Any thread may use it.

    It starts with the most requests and halves them in trials, each of which takes twice as long at worst. With distant object
    storage, where each connection is slow, it stays with the most; with a server nearby it ends at one request.

    A *halving* of h means 2**h times as many bytes per request.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._best = 0
        self._pace: dict[int, float] = {}
        """Seconds per byte, by number of halvings."""

    def halvings(self, most: int) -> int:
        """Returns how often to halve the number of requests for the next value.

        Args:
            most: number of requests without halving.
        """
        with self._lock:
            highest = (most - 1).bit_length()
            best = min(self._best, highest)
            if best not in self._pace:
                return best
            others = [n for n in (best - 1, best + 1) if 0 <= n <= highest]
            choice = min([best, *others], key=lambda n: self._pace.get(n, 0.0))
            for other in others:
                if other != choice and other in self._pace:
                    self._pace[other] *= FORGETTING
            return choice

    def learn(self, halvings: int, nbytes: int, seconds: float) -> None:
        """Records that a value of `nbytes` bytes was read in `seconds`."""
        pace = seconds / nbytes
        with self._lock:
            # After much forgetting, an old pace is less informative than the trial.
            before = self._pace.get(halvings, pace) if halvings == self._best else pace
            self._pace[halvings] = before + NEW_WEIGHT * (pace - before)
            if self._pace[halvings] < self._pace.get(self._best, float("inf")):
                self._best = halvings
