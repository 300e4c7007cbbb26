"""Which blocks of each request are stored when it comes: a store of limited size that evicts what was used least recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from benchmarks.traces.requests import Request, Trace


class LeastRecentlyUsed:
    """The names of the blocks in a store. A prompt's last block counts as used before its first one, as in engines: so of a
    prompt the end is evicted first, and what is stored of it is always a prefix.

    Args:
        capacity: most blocks; None for no limit.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 0:
            raise ValueError(f"A store cannot hold {capacity} blocks.")
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def hits(self, blocks: Sequence[int]) -> int:
        """Returns how many leading blocks are stored."""
        for count, block in enumerate(blocks):
            if block not in self._blocks:
                return count
        return len(blocks)

    def use(self, blocks: Sequence[int]) -> None:
        """Stores the blocks of a prompt, or marks them as used just now."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while self._capacity is not None and len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


def hits_of(trace: Trace, capacity: int | None = None) -> list[int]:
    """Returns for each request how many of its leading blocks are stored when it is served: one after the other, each prompt's
    blocks being saved by the time the next one comes."""
    store = LeastRecentlyUsed(capacity)
    return [_served(store, request) for request in trace.requests]


def _served(store: LeastRecentlyUsed, request: Request) -> int:
    hits = store.hits(request.blocks)
    store.use(request.blocks)
    return hits
