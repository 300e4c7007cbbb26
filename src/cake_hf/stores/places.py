"""What eviction wants to know of a chunk's header. Nothing else on this floor looks into a value.

It is a hint, so it is read without the codec (which brings torch with it) and trusted with nothing but the order in which
chunks go: whatever cannot be read is no error, but no place.
"""

from __future__ import annotations

import json
import re

from cake_hf.stores.eviction import ChunkPosition

START_BYTES = 2**16
"""So many bytes of a value are enough to find its place; the metadata comes first in a header of ours."""

FIRST_BYTES = 2**12
"""So many are enough for nearly all of them."""

MAX_INDEX = 2**40
_METADATA = re.compile(r'\s*\{\s*"__metadata__"\s*:\s*')


def place_in(start: bytes) -> ChunkPosition | None:
    """The place of a chunk in its prompt, or None where it cannot be told.

    Args:
        start: the first `START_BYTES` of a value, or all of a shorter one.
    """
    length = int.from_bytes(start[:8], "little")
    text = start[8 : 8 + min(length, len(start))].decode("latin-1")  # what we look for is ASCII, and this never fails
    opening = _METADATA.match(text)
    if opening is None:
        return None
    try:
        metadata, _ = json.JSONDecoder().raw_decode(text, opening.end())
        index, parent = int(metadata["index"]), metadata["parent"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return ChunkPosition(index, parent) if isinstance(parent, str) and 0 <= index < MAX_INDEX else None
