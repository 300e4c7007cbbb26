"""The manifest of a value in Redis: a small key that describes the value's slices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MANIFEST_BYTES = 63
"""Index of the last byte of a manifest that is read. Ours are shorter; for others no more memory is used."""

MAX_SLICES = 2**16
"""Most slices of a value; a manifest that claims more is not ours."""


@dataclass(frozen=True)
class Manifest:
    """A value's size and slices.

    Attributes:
        size: bytes of the value.
        slice_bytes: bytes of each slice except the last.
        tag: tag in the names of the slices.
    """

    size: int
    slice_bytes: int
    tag: str

    def encode(self) -> bytes:
        """Returns the manifest as it is stored."""
        return f"1 {self.size} {self.slice_bytes} {self.tag}".encode()

    @classmethod
    def parse(cls, raw: bytes) -> Manifest | None:
        """Parses a stored manifest; returns None if it is missing or not ours."""
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
        """Iterates over the parts of slices that make up `count` bytes from an offset in the value: (slice, begin, end)."""
        end = offset + count
        for number in range(offset // self.slice_bytes, -(-end // self.slice_bytes) if count else 0):
            start = number * self.slice_bytes
            yield number, max(offset - start, 0), min(end - start, self.slice_bytes)
