"""What a value in Redis consists of: a small key of its own that names the slices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MANIFEST_BYTES = 63
"""Index of the last byte that is read of a manifest; ours are shorter, and no more memory is taken for others."""

MAX_SLICES = 2**16
"""A manifest that claims more is none of ours."""


@dataclass(frozen=True)
class Manifest:
    """What a value consists of.

    Attributes:
        size: bytes of the value.
        slice_bytes: of each slice but the last.
        tag: of its slices.
    """

    size: int
    slice_bytes: int
    tag: str

    def encode(self) -> bytes:
        """As it is stored."""
        return f"1 {self.size} {self.slice_bytes} {self.tag}".encode()

    @classmethod
    def parse(cls, raw: bytes) -> Manifest | None:
        """None where there is none, or something that is none of ours."""
        match = re.fullmatch(rb"1 (\d{1,15}) ([1-9]\d{0,9}) ([0-9a-f]{16})", raw)
        if match is None:
            return None
        found = cls(int(match[1]), int(match[2]), match[3].decode())
        return found if found.size <= found.slice_bytes * MAX_SLICES else None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each slice."""
        full, rest = divmod(self.size, self.slice_bytes)
        return [self.slice_bytes] * full + [rest] * (rest > 0)

    def ranges(self, offset: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Which bytes of which slices are `count` bytes from an offset in the value: (slice, begin, end)."""
        end = offset + count
        for number in range(offset // self.slice_bytes, -(-end // self.slice_bytes) if count else 0):
            start = number * self.slice_bytes
            yield number, max(offset - start, 0), min(end - start, self.slice_bytes)
