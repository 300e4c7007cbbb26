"""The tensors of a chunk, as its header lists them: safetensors' dtype, shape and place of each, checked.

All chunks of one layout list them in the same words. So a table that was read a moment ago is known by its text: reading it
again would take most of the time, and keeping it again most of the memory, of who looks at many chunks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache

from cake_hf.chunks.layout import item_bytes, sorted_json
from cake_hf.errors import CorruptChunk
from cake_hf.util.lazy import cached_property

MAX_PAYLOAD_BYTES = 2**40
MAX_EXTENT = 2**31
MAX_DIMENSIONS = 8
"""Of one tensor. Numbers beyond these are refused before anybody computes with them."""

METADATA = "__metadata__"

MOST_KNOWN = 8
"""Tables that are kept."""
LONGEST_KNOWN = 2**17
"""Characters of a table that is kept: some 1,500 tensors. As Python objects it takes 20 times as many bytes."""

Entry = Mapping[str, object]


class TensorTable(dict[str, dict[str, object]]):
    """Name -> dtype, shape and data offsets, of a header that was read. It may be shared: do not change it."""

    @cached_property
    def payload_bytes(self) -> int:
        """As `payload_size` has it, with what it raises."""
        return payload_size(self)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of each tensor in the payload, in bytes, in this order."""
        return sorted(offsets_of(entry) for entry in self.values())

    @cached_property
    def sorted_json(self) -> str:
        """As a header's seal covers it."""
        return sorted_json(self)

    @cached_property
    def shapes(self) -> list[list[int]]:
        """The different shapes of its tensors, `[tokens, heads, head_dim]` in the chunks of ours."""
        return [list(shape) for shape in sorted(set(map(_shape, self.values())))]

    @cached_property
    def dtypes(self) -> str:
        """The different dtypes of its tensors, as safetensors names them."""
        return ", ".join(sorted({str(entry["dtype"]) for entry in self.values()}))

    @cached_property
    def chunk_size(self) -> int:
        """Tokens of the chunk: the first dimension of each of its tensors, of which it has at least one."""
        return _shape(next(iter(self.values())))[0]


def checked_table(table: Mapping[str, dict[str, object]]) -> TensorTable:
    """The same, if each tensor is what its dtype and shape make it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not.
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
    """A table by its text, as it stands behind the metadata of a header: members of a JSON object, and the brace that ends it.

    Args:
        text: in ASCII, not longer than `LONGEST_KNOWN`.

    Raises:
        Exception: as `checked_table` and `json.loads` have it, or there are other metadata among the members.
    """
    table = json.loads(f"{{{text}")
    if METADATA in table:
        raise ValueError("a header has its metadata once")
    return checked_table(table)


def payload_size(table: Mapping[str, Entry]) -> int:
    """Bytes of payload that a tensor table describes.

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
    """Where in the payload a tensor of the table begins and ends, in bytes.

    Raises:
        KeyError, TypeError, ValueError: the entry does not say it; never of a table that `parse_header` gave.
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
