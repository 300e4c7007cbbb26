"""Reads a chunk's position from its header, for eviction. Nothing else in `stores` looks into a value.

The position is a hint, so it is read without the codec (which imports torch), and only the order of eviction depends on it: an
unreadable header is not an error, just a chunk without a position.
"""

from __future__ import annotations

import json
import re

from cake_hf.stores.eviction import ChunkPosition

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
