"""The tensor table in a chunk's header: safetensors' dtype, shape and offsets of each tensor, checked.

All chunks of one layout have the same table text, so a recently read table is recognised by its text. When many chunks are
inspected, parsing each table again would take most of the time, and keeping each one most of the memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache

from cake_hf.chunks.layout import item_bytes, sorted_json
from cake_hf.errors import CorruptChunk
from cake_hf.util.forks import cached_property

MAX_PAYLOAD_BYTES = 2**40
MAX_EXTENT = 2**31
MAX_DIMENSIONS = 8
"""Per tensor. Numbers beyond these limits are refused before they are used in any calculation."""

METADATA = "__metadata__"

MOST_KNOWN = 8
"""Number of tables that are kept."""
LONGEST_KNOWN = 2**17
"""Maximum characters of a table that is kept: some 1,500 tensors. As Python objects it takes 20 times as many bytes."""

Entry = Mapping[str, object]


class TensorTable(dict[str, dict[str, object]]):
    """Name -> dtype, shape and data offsets, from a parsed header. It may be shared: do not change it."""

    @cached_property
    def payload_bytes(self) -> int:
        """The result of `payload_size`, including what that raises."""
        return payload_size(self)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each tensor in the payload, in bytes, in payload order."""
        return sorted(offsets_of(entry) for entry in self.values())

    @cached_property
    def sorted_json(self) -> str:
        """The table as covered by a header's seal."""
        return sorted_json(self)

    @cached_property
    def shapes(self) -> list[list[int]]:
        """The distinct shapes of its tensors; `[tokens, heads, head_dim]` in chunks of this library."""
        return [list(shape) for shape in sorted(set(map(_shape, self.values())))]

    @cached_property
    def dtypes(self) -> str:
        """The distinct dtypes of its tensors, as safetensors names them."""
        return ", ".join(sorted({str(entry["dtype"]) for entry in self.values()}))

    @cached_property
    def chunk_size(self) -> int:
        """Tokens of the chunk: the first dimension of each of its tensors, of which there is at least one."""
        return _shape(next(iter(self.values())))[0]


def checked_table(table: Mapping[str, dict[str, object]]) -> TensorTable:
    """Returns the table if the size of each tensor matches its dtype and shape.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it does not.
    """
    for entry in table.values():
        start, stop = offsets_of(entry)
        shape = entry["shape"]
        if not isinstance(shape, list) or not 0 < len(shape) <= MAX_DIMENSIONS:
            raise ValueError("a shape is no list of a few numbers")
        if any(type(size) is not int or not 0 <= size < MAX_EXTENT for size in shape):
            raise ValueError("a shape is out of range")
        if not 0 <= start <= stop < MAX_PAYLOAD_BYTES or math.prod(shape) * item_bytes(entry["dtype"]) != stop - start:
            raise ValueError("a tensor is not as large as its dtype and shape")
    return TensorTable(table)


@lru_cache(MOST_KNOWN)
def known_table(text: str) -> TensorTable:
    """Returns a table by its text, as it follows the metadata of a header: members of a JSON object, and the closing brace.

    Args:
        text: in ASCII, not longer than `LONGEST_KNOWN`.

    Raises:
        Exception: as raised by `checked_table` and `json.loads`, or the members contain metadata, too.
    """
    table = json.loads(f"{{{text}")
    if METADATA in table:
        raise ValueError("a header has its metadata once")
    return checked_table(table)


def payload_size(table: Mapping[str, Entry]) -> int:
    """Returns the bytes of payload that a tensor table describes.

    Raises:
        CorruptChunk: the table's offsets are not back to back from zero.
    """
    end = 0
    try:
        for start, stop in sorted(offsets_of(entry) for entry in table.values()):
            if start != end or stop < start:
                raise CorruptChunk("The chunk's tensors overlap or leave holes.")
            end = stop
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptChunk("The chunk's tensor table cannot be read.") from error
    return end


def offsets_of(entry: Entry) -> tuple[int, int]:
    """Returns where in the payload a tensor of the table starts and ends, in bytes.

    Raises:
        KeyError, TypeError, ValueError: the entry does not say; never for a table returned by `parse_header`.
    """
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or any(type(offset) is not int for offset in offsets):
        raise TypeError("data_offsets is no list of numbers")
    start, stop = offsets
    return start, stop


def _shape(entry: Entry) -> tuple[int, ...]:
    shape = entry["shape"]
    assert isinstance(shape, list)  # see checked_table
    return tuple(shape)
