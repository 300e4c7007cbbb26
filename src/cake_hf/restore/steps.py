"""Which chunk the main thread makes next: the frontier decides or, in a tensor-parallel model, all ranks agree.

Each rank has a frontier and loaders of its own, which run freely. But all ranks run a forward together. So before each forward
every rank says which chunk it would make next, and all make the first of these. Ranks that already have it, because they loaded
it, make it again: it is the same KV, bit for bit, in the same place. So no rank waits for a chunk that another rank has lost,
and no forward is started, or preempted, by only some of the ranks.

The first of the chunks named only ever grows: a rank that has named it has it afterwards. So there are at most as many steps as
chunks.
"""

from __future__ import annotations

from collections.abc import Callable

from cake_hf.model.ranks import Ranks
from cake_hf.scheduling.frontier import Frontier


class Steps:
    """The steps of a process that computes alone. The methods are those of the frontier.

    Attributes:
        overruled: chunks that were loaded, and made again since another rank had to make them.
    """

    def __init__(self, frontier: Frontier) -> None:
        self._frontier = frontier
        self.overruled: set[int] = set()

    def advance(self, *, until: int, past_loads: bool) -> int | None:
        """Same as `Frontier.advance`."""
        return self._frontier.advance(until=until, past_loads=past_loads)

    def preempted(self, index: int) -> bool:
        """Same as `Frontier.preempted`."""
        return self._frontier.preempted(index)

    def computed(self, index: int) -> None:
        """Same as `Frontier.computed`."""
        self._frontier.computed(index)

    def stand(self, come_near: Callable[[int], int], index: int) -> int:
        """Moves as near to a chunk as possible; returns where. See `Carried.come_near`."""
        return come_near(index)


class AgreedSteps(Steps):
    """The steps of one rank among several. All ranks take the same steps."""

    def __init__(self, frontier: Frontier, ranks: Ranks) -> None:
        super().__init__(frontier)
        self._ranks = ranks
        self._own: int | None = None  # what this rank would make next; None for nothing
        self._asks = True  # whether to ask the frontier for the next chunk

    def advance(self, *, until: int, past_loads: bool) -> int | None:
        """Same as `Frontier.advance`, for all ranks. No rank goes past loads: others may have to make these chunks."""
        if self._asks or (self._own is not None and self._frontier.preempted(self._own)):
            self._own, self._asks = self._frontier.advance(until=until), False
        (agreed,) = self._ranks.all_reduce_min([until if self._own is None else self._own])
        if agreed == until:
            return None
        if agreed != self._own:
            self.overruled.add(agreed)
        return agreed

    def preempted(self, index: int) -> bool:
        """False: the other ranks are in the same forward."""
        return False

    def computed(self, index: int) -> None:
        """Same as `Frontier.computed`, if the chunk was the one that this rank named."""
        if index == self._own:
            self._frontier.computed(index)
            self._asks = True

    def stand(self, come_near: Callable[[int], int], index: int) -> int:
        """Moves as near to a chunk as all ranks can."""
        at = come_near(index)
        while True:
            least, greatest = self._ranks.span(at)
            if least == greatest:
                return at
            at = come_near(least)


def steps_for(frontier: Frontier, ranks: Ranks | None) -> Steps:
    """Returns the steps of a process alone, or of one rank among several."""
    return Steps(frontier) if ranks is None else AgreedSteps(frontier, ranks)
