"""Forged chunks: well-formed, with the right key and layout and a matching checksum, but with KV that no model made.

They demonstrate the limits of a chunk's checks. Only computing the chunk again detects them (`cake-hf verify --recompute`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace

from cake_hf.chunks.codec import checksum, checksums, encode_header, header_size, parse_header, sealed_header
from cake_hf.chunks.encoded_header import is_encoded, parse_encoded_header
from cake_hf.chunks.stored_forms import encoded_file, raw_file


def blank(payload: bytearray) -> None:
    """Sets the payload to zeros."""
    payload[:] = bytes(len(payload))


def one_bit(payload: bytearray) -> None:
    """Flips one bit in the middle of the payload, the smallest possible forgery."""
    payload[len(payload) // 2] ^= 1


def forge(raw: bytes | bytearray, change: Callable[[bytearray], None] = blank) -> bytes:
    """Returns a chunk file with a changed payload and matching checksums; a raw one has the same length.

    Args:
        raw: a whole chunk file.
        change: changes its payload in place.

    Raises:
        CorruptChunk: `raw` is not a chunk file.
    """
    if is_encoded(raw):
        return _forge_encoded(raw, change)
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


def _forge_encoded(raw: bytes | bytearray, change: Callable[[bytearray], None]) -> bytes:
    facts, layout = parse_encoded_header(raw)
    plain = raw_file(raw, facts.facts.key)
    payload = bytearray(plain[header_size(layout) :])
    change(payload)
    told = replace(facts.facts, checksums=checksums(payload, layout))
    # What was coded by a lossy codec need not be compressible otherwise; a raw chunk says the same.
    return b"".join(encoded_file(payload, layout, told) or [encode_header(layout, told), payload])
