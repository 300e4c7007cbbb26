"""Orders of eviction, and the chunk's position in its header that they use: pure functions over a store's list of values.

`lru`            the chunk that was used longest ago is evicted first.
`front-first`    the prompt that was used longest ago is evicted first, and of its chunks the one nearest to the prompt's
                 start, which is the cheapest to compute, since later chunks attend to more tokens.

A chunk's position is a hint: it is read without the codec (which imports torch), and only the order of eviction depends on it.
An unreadable header is not an error, just a chunk without a position. Nothing else in `stores` looks into a value.
"""

from __future__ import annotations

import json
import re
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
    """A chunk's position in its prompt.

    Attributes:
        index: the chunk's number on the absolute grid.
        parent: key of the chunk before it.
    """

    index: int
    parent: str


FUTURE_SECONDS = 3600.0
"""Upper bound on the difference between clocks of machines that share a directory."""

_AGES = 2.0**33


def date_of_use(noted: float, now: float) -> float:
    """Returns when a value was used, from its file's date, in seconds since the epoch.

    A date in the future comes from a wrong clock, and the right date is unknown. Such values must not stay for ever, so they
    are evicted before all others; among them the order of their dates is kept.
    """
    return noted if noted <= now + FUTURE_SECONDS else noted - _AGES


Order = Callable[[Sequence[Entry]], list[Entry]]
"""Sorts values, the first to be evicted first."""


def order_named(name: str, place_of: Callable[[str], ChunkPosition | None]) -> Order:
    """Returns the order of that name.

    Args:
        name: one of `EVICTIONS`.
        place_of: returns the position of the chunk with a key, or None if it is unknown. Called once per key.

    Raises:
        ValueError: there is no such order.
    """
    if name not in EVICTIONS:
        raise ValueError(f"eviction {name!r} is unknown; choose one of {', '.join(EVICTIONS)}.")
    return FrontFirst(place_of) if name == FRONT_FIRST else least_recently_used


def least_recently_used(entries: Sequence[Entry]) -> list[Entry]:
    """Sorts entries by last use, the oldest first."""
    return sorted(entries, key=lambda entry: (entry.used, entry.key))


class FrontFirst:
    """`front_first` with a cache of the chunks' positions, which never change, since keys are digests."""

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
    """Sorts entries by prompt, the one used longest ago first, and within a prompt from its front.

    Prompts share prefixes, so chunks form trees. Each tree is split into prompts: at each chunk, the prompt continues with the
    child whose subtree was used last; the other children start prompts of their own. So a shared prefix belongs to the prompt
    that was used last. A prompt counts as used when any of its chunks was used: chunks at the front are often computed instead
    of read.

    Args:
        entries: all chunks of a store.
        places: the chunks' positions, by key; a chunk without a position counts as a prompt of its own.
    """
    by_index = sorted(entries, key=lambda entry: places[entry.key].index if entry.key in places else 0)
    parents = _parents(by_index, places)
    used_below = {entry.key: entry.used for entry in by_index}  # last use in a chunk's subtree
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
    # The sort is stable: chunks of a prompt stay ordered by index.
    return sorted(by_index, key=lambda entry: (used_below[heads[entry.key]], heads[entry.key]))


def _parents(entries: Sequence[Entry], places: dict[str, ChunkPosition]) -> dict[str, str]:
    """Maps a chunk's key to the key of the stored chunk before it. Indices must fall by one, so there are no cycles."""
    parents = {}
    for entry in entries:
        place = places.get(entry.key)
        parent = places.get(place.parent) if place else None
        if place and parent and parent.index == place.index - 1:
            parents[entry.key] = place.parent
    return parents


START_BYTES = 2**16
"""Bytes from a value's start that suffice to find its position; the metadata comes first in our headers."""

FIRST_BYTES = 2**12
"""Bytes that suffice for nearly all values."""

MAX_INDEX = 2**40
_METADATA = re.compile(r'\s*\{\s*"__metadata__"\s*:\s*')


def place_in(start: bytes) -> ChunkPosition | None:
    """Returns the position of a chunk in its prompt, or None if it is unknown.

    Args:
        start: the first `START_BYTES` of a value, or the whole of a shorter value.
    """
    length = int.from_bytes(start[:8], "little")
    text = start[8 : 8 + min(length, len(start))].decode("latin-1")  # the metadata is ASCII, and latin-1 never fails
    opening = _METADATA.match(text)
    if opening is None:
        return None
    try:
        metadata, _ = json.JSONDecoder().raw_decode(text, opening.end())
        index, parent = int(metadata["index"]), metadata["parent"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return ChunkPosition(index, parent) if isinstance(parent, str) and 0 <= index < MAX_INDEX else None
