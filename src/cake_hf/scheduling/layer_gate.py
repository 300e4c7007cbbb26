"""The layer gate: what comes after the last loads runs through a layer as soon as that layer of them has arrived.

The last loads, one per thread, are read in ranges of layers. The main thread goes past them
(`Frontier.advance(past_loads=True)`) and then, in each layer of the forward that follows, waits here for that layer of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.frontier import Frontier

MAX_RANGES = 16
"""Finer ranges would hide hardly any more time, and each costs a read."""

RANGES_COST = 0.05
"""Fraction of a chunk's load time that reading it in ranges may add; only the last few chunks pay it."""


def ranges_of(costs: Costs, layers: int, range_seconds: float) -> int:
    """Returns the number of layer ranges in which to read a chunk whose layers are waited for; 1 if a cost is not known.

    Encoded chunks come whole: 1, too, if most are. Otherwise one range per layer (at most MAX_RANGES), or fewer, so that
    reading in ranges costs at most RANGES_COST of the chunk's time on the path more than reading the chunk at once.

    Args:
        costs: the believed costs.
        layers: layers of a chunk.
        range_seconds: seconds that reading a range costs beyond its share of the chunk.
    """
    if costs.load is None or costs.come_encoded:
        return 1
    interval = costs.load.interval
    if not range_seconds < interval:
        return 1
    affordable = RANGES_COST * interval / range_seconds if range_seconds > 0 else layers
    return max(1, int(min(layers, MAX_RANGES, affordable)))


class LayerGate:
    """The gate of one restore. Loaders call `ranges_of` and `landed`; the rest is for the main thread.

    Args:
        frontier: the ledger of the restore.
        last: number of chunks that count as the last to be loaded.
        ranges: number of layer ranges in which these are read; with 1, nothing goes past loads.

    Attributes:
        beyond: the chunk at which the main thread is beyond loads (the chunk count if at the end), or 0.
    """

    def __init__(self, frontier: Frontier, *, last: int, ranges: int) -> None:
        self.beyond = 0
        self._frontier = frontier
        self._last = last
        self._ranges = ranges
        self._landed: dict[int, int] = {}  # layers of each chunk; those of a load that has failed are not asked for

    # Loaders.

    def ranges_of(self, index: int) -> int:
        """Returns the number of ranges in which to read a claimed chunk."""
        return self._ranges if self.is_open and self._frontier.comes_in_parts(index, self._last) else 1

    def landed(self, index: int, layers: int) -> None:
        """Reports that the first `layers` layers of a claimed chunk have arrived."""
        self._landed[index] = layers
        self._frontier.notify()

    # Main thread.

    @property
    def is_open(self) -> bool:
        """Whether the main thread may go past loads."""
        return self._ranges > 1

    def went_to(self, index: int) -> None:
        """Notes at which chunk the main thread is; loads of earlier ones may still be under way."""
        self.beyond = index if self.is_open and self._frontier.missing(index) else 0

    def await_layer(self, layer: int, commit: Callable[[list[int]], None], make: Callable[[int], None]) -> None:
        """Returns once that layer of all chunks before `beyond` is in the layers' buffers.

        Args:
            layer: that the forward has come to.
            commit: puts this layer of the given chunks into place, if they are staged; their loads are still under way.
            make: makes all chunks before the given one, in the middle of the forward. Called if a load has failed or is late.
        """
        missing = self._frontier.missing(self.beyond)
        if all(self._frontier.await_load(index, partial(self._has, index, layer)) for index in missing):
            commit([index for index in missing if self._frontier.is_wanted(index) and self._has(index, layer)])
        else:
            make(self.beyond)

    def _has(self, index: int, layer: int) -> bool:
        return self._landed.get(index, 0) > layer
