"""Which chunk the main thread makes next: what its frontier says or, in a tensor-parallel model, what all ranks agree on.

Each rank has a frontier and loaders of its own, which run freely. But a forward is one of all ranks together. So before each
of them every rank says which chunk it would make next, and all make the first of these. Ranks that have it already, since
their load of it went well, make it again: it is the same KV, bit for bit, and lies where it lay. So no rank waits for what
another one has lost, and no forward is begun, or left, by some of them only.

The first of the chunks named only ever grows: who has named it has it afterwards. So there are at most as many steps as chunks.
"""

from __future__ import annotations

from collections.abc import Callable

from cake_hf.model.ranks import Ranks
from cake_hf.scheduling.frontier import Frontier


class Steps:
    """Of a process that computes alone. The methods are those of the frontier.

    Attributes:
        overruled: chunks that were loaded, and made again since another rank had to make them.
    """

    def __init__(self, frontier: Frontier) -> None:
        self._frontier = frontier
        self.overruled: set[int] = set()

    def advance(self, *, until: int, past_loads: bool) -> int | None:
        """As `Frontier.advance`."""
        return self._frontier.advance(until=until, past_loads=past_loads)

    def preempted(self, index: int) -> bool:
        """As `Frontier.preempted`."""
        return self._frontier.preempted(index)

    def computed(self, index: int) -> None:
        """As `Frontier.computed`."""
        self._frontier.computed(index)

    def stand(self, come_near: Callable[[int], int], index: int) -> int:
        """Come as near to a chunk as is possible; returns where. See `Carried.come_near`."""
        return come_near(index)


class AgreedSteps(Steps):
    """Of one rank among several. All of them take the same steps."""

    def __init__(self, frontier: Frontier, ranks: Ranks) -> None:
        super().__init__(frontier)
        self._ranks = ranks
        self._own: int | None = None  # what this rank would make next; None for nothing
        self._asks = True  # the frontier has not said so yet, or it is made

    def advance(self, *, until: int, past_loads: bool) -> int | None:
        """As `Frontier.advance`, but for all ranks. Nobody goes beyond loads: the others may have to make what these bring."""
        if self._asks or (self._own is not None and self._frontier.preempted(self._own)):
            self._own, self._asks = self._frontier.advance(until=until), False
        (agreed,) = self._ranks.all_reduce_min([until if self._own is None else self._own])
        if agreed == until:
            return None
        if agreed != self._own:
            self.overruled.add(agreed)
        return agreed

    def preempted(self, index: int) -> bool:
        """Never: the other ranks are in that forward."""
        return False

    def computed(self, index: int) -> None:
        """As `Frontier.computed`, if it was this rank's own."""
        if index == self._own:
            self._frontier.computed(index)
            self._asks = True

    def stand(self, come_near: Callable[[int], int], index: int) -> int:
        """As near as all ranks can come."""
        at = come_near(index)
        while True:
            least, greatest = self._ranks.span(at)
            if least == greatest:
                return at
            at = come_near(least)


def steps_for(frontier: Frontier, ranks: Ranks | None) -> Steps:
    """The steps of a process alone, or of one among several."""
    return Steps(frontier) if ranks is None else AgreedSteps(frontier, ranks)
