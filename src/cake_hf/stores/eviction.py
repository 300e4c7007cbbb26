"""In which order chunks go when room is needed: pure functions over what a store knows about its values.

`lru`            the chunk that was used longest ago goes first.
`front-first`    the prompt that was used longest ago goes first, and of its chunks the one nearest to the prompt's start:
                 that is the cheapest to compute, since later chunks attend to more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LRU = "lru"
FRONT_FIRST = "front-first"
EVICTIONS = (LRU, FRONT_FIRST)


@dataclass(frozen=True)
class Entry:
    """One value of a store.

    Attributes:
        key: its name.
        nbytes: its size.
        used: when it was written or last read, in seconds since the epoch.
    """

    key: str
    nbytes: int
    used: float


@dataclass(frozen=True)
class ChunkPosition:
    """Where a chunk stands in its prompt.

    Attributes:
        index: on the absolute grid.
        parent: key of the chunk before it.
    """

    index: int
    parent: str


FUTURE_SECONDS = 3600.0
"""Clocks of machines that share a directory differ by less."""

_AGES = 2.0**33


def date_of_use(noted: float, now: float) -> float:
    """When a value was used, by the date that its file has, in seconds since the epoch.

    A date in the future was noted by a clock that was wrong; nobody knows the right one. Such a value must not be the one that
    stays for ever, so it goes before all others; among its like the order of their dates is kept.
    """
    return noted if noted <= now + FUTURE_SECONDS else noted - _AGES


Order = Callable[[Sequence[Entry]], list[Entry]]
"""Sorts values by who goes first."""


def order_named(name: str, place_of: Callable[[str], ChunkPosition | None]) -> Order:
    """The order of that name.

    Args:
        name: one of `EVICTIONS`.
        place_of: the place of the chunk with a key; None where it cannot be told. Asked once per key.

    Raises:
        ValueError: there is no such order.
    """
    if name not in EVICTIONS:
        raise ValueError(f"eviction {name!r} is unknown; choose one of {', '.join(EVICTIONS)}.")
    return FrontFirst(place_of) if name == FRONT_FIRST else least_recently_used


def least_recently_used(entries: Sequence[Entry]) -> list[Entry]:
    """What was used longest ago goes first."""
    return sorted(entries, key=lambda entry: (entry.used, entry.key))


class FrontFirst:
    """`front_first` that remembers the places of the chunks it has seen; they never change, since keys are digests."""

    def __init__(self, place_of: Callable[[str], ChunkPosition | None]) -> None:
        self._place_of = place_of
        self._places: dict[str, ChunkPosition | None] = {}

    def __call__(self, entries: Sequence[Entry]) -> list[Entry]:
        known = self._places
        self._places = {
            entry.key: known[entry.key] if entry.key in known else self._place_of(entry.key) for entry in entries
        }
        return front_first(entries, {key: place for key, place in self._places.items() if place is not None})


def front_first(entries: Sequence[Entry], places: dict[str, ChunkPosition]) -> list[Entry]:
    """The prompt that was used longest ago goes first, from its front.

    Prompts share prefixes, so chunks form trees. Each tree is taken apart into prompts: from a chunk on, the prompt follows the
    child below which something was used last; the other children begin prompts of their own. So a shared prefix belongs to
    the prompt that was used last. A prompt counts as used when any of its chunks was: those at the front are often not
    read, but computed.

    Args:
        entries: of all chunks of a store.
        places: of the chunks by key; a chunk without one counts as a prompt of its own.
    """
    by_index = sorted(entries, key=lambda entry: places[entry.key].index if entry.key in places else 0)
    parents = _parents(by_index, places)
    used_below = {entry.key: entry.used for entry in by_index}  # when a chunk, or one that goes on from it, was used
    successor: dict[str, str] = {}
    for entry in reversed(by_index):
        parent = parents.get(entry.key)
        if parent is not None:
            used = used_below[entry.key]
            if parent not in successor or used > used_below[successor[parent]]:
                successor[parent] = entry.key
            used_below[parent] = max(used_below[parent], used)
    heads: dict[str, str] = {}
    for entry in by_index:
        parent = parents.get(entry.key)
        follows = parent is not None and successor[parent] == entry.key
        heads[entry.key] = heads[parent] if parent is not None and follows else entry.key
    # The sort is stable: within a prompt the order stays that of the index.
    return sorted(by_index, key=lambda entry: (used_below[heads[entry.key]], heads[entry.key]))


def _parents(entries: Sequence[Entry], places: dict[str, ChunkPosition]) -> dict[str, str]:
    """Key of a chunk -> key of the stored chunk before it. Indices must fall by one, so no places make a ring."""
    parents = {}
    for entry in entries:
        place = places.get(entry.key)
        parent = places.get(place.parent) if place else None
        if place and parent and parent.index == place.index - 1:
            parents[entry.key] = place.parent
    return parents
