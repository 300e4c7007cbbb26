"""A chunk that lies: well-formed, of the right key and layout, with a checksum that matches, and with KV that no model made.

It shows what the checks of a chunk do not promise. Only computing the chunk again finds it (`cake-hf verify --recompute`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

from cake_hf.chunks.codec import checksum, parse_header, sealed_header


def blank(payload: bytearray) -> None:
    """All zeros: KV that says nothing."""
    payload[:] = bytes(len(payload))


def one_bit(payload: bytearray) -> None:
    """The smallest lie."""
    payload[len(payload) // 2] ^= 1


def forge(raw: bytes | bytearray, change: Callable[[bytearray], None] = blank) -> bytes:
    """A chunk file with another payload and the checksums that go with it, as long as it was.

    Args:
        raw: a whole chunk file.
        change: what is done to its payload, in place.

    Raises:
        CorruptChunk: it is not a chunk file.
    """
    parse_header(raw)
    (length,) = struct.unpack("<Q", bytes(raw[:8]))
    start = 8 + length
    payload = bytearray(raw[start:])
    change(payload)
    table = json.loads(bytes(raw[8:start]))
    metadata = table.pop("__metadata__")
    del metadata["header"]
    spans = sorted(entry["data_offsets"] for entry in table.values())
    metadata["checksums"] = "".join(checksum(memoryview(payload)[begin:end]) for begin, end in spans)
    return sealed_header(metadata, table, start) + bytes(payload)
