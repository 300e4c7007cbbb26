"""Both stored forms of a chunk, raw (format version 2) and encoded (version 3): made, checked and told apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cake_hf.chunks.codec import (
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    Buffer,
    ChunkMetadata,
    check_file,
    checksum,
    encode_header,
    header_size,
    parse_header,
    stored_bytes,
)
from cake_hf.chunks.decoding import decode_into
from cake_hf.chunks.encoded_checks import check_encoded, check_encoded_file, describe, refuse_inflated
from cake_hf.chunks.encoded_header import (
    ENCODED_VERSION,
    EncodedMetadata,
    check_encoded_header,
    encoded_header_size,
    is_encoded,
    most_stored_bytes,
    parse_encoded_header,
)
from cake_hf.chunks.encoded_header import encode_header as encoded_header
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import CODEC, Encoded, decode_base_into, encode
from cake_hf.errors import CorruptChunk, NewerChunk

_VERSION = re.compile(rb'.{8}\{"__metadata__":\{"format":"cake_hf","version":"([0-9]{1,9})",', re.DOTALL)
START_BYTES = 96
"""Bytes from a file's start that tell its format version."""

HEADER_BYTES = 8 + MAX_HEADER_BYTES


def can_be_encoded(layout: ChunkLayout) -> bool:
    """Returns whether any piece of the layout is of a dtype that the lossless codec encodes."""
    return any(layout.channels)


def room_for(layout: ChunkLayout) -> int:
    """Returns the most bytes that a chunk of the layout has as a file, in either form."""
    return max(stored_bytes(layout), most_stored_bytes(layout))


def encoded_file(payload: Buffer, layout: ChunkLayout, facts: ChunkMetadata) -> list[Buffer] | None:
    """Returns a chunk's encoded file, in parts; None if it would not be smaller than the raw one.

    Args:
        payload: the layout's pieces, back to back.
        layout: of the chunk.
        facts: with the checksums of the pieces.

    Raises:
        CorruptChunk: what was encoded does not decode to the same bytes.
    """
    if not can_be_encoded(layout):
        return None
    encoded = encode(payload, layout)
    if encoded_header_size(layout) + encoded.sizes.nbytes >= stored_bytes(layout):
        return None
    decoded = memoryview(bytearray(layout.nbytes))
    parts = split(decoded, layout)
    decode_into(CODEC, encoded.bases, encoded.refinements, encoded.sizes, layout, parts)
    if tuple(map(checksum, parts)) != facts.checksums:
        raise CorruptChunk(f"Chunk {facts.key} does not decode to what was encoded.")
    return file_of(encoded, layout, facts)


def file_of(encoded: Encoded, layout: ChunkLayout, facts: ChunkMetadata, codec: str = CODEC) -> list[Buffer]:
    """Returns the file of a chunk that was encoded, in parts.

    Args:
        encoded: the chunk.
        layout: of the chunk.
        facts: with the checksums of what the pieces decode to.
        codec: by which it was encoded.
    """
    return [encoded_header(layout, describe(facts, encoded, codec)), encoded.bases, encoded.refinements]


@dataclass(frozen=True)
class EncodedPieces:
    """The first pieces of an encoded chunk, or the bases of them alone.

    Attributes:
        metadata: of the chunk.
        count: number of pieces.
        bases: of these pieces, back to back.
        refinements: likewise; empty if they were left out.
    """

    metadata: EncodedMetadata
    count: int
    bases: memoryview
    refinements: memoryview

    @property
    def are_rounded(self) -> bool:
        """Whether refinements were left out."""
        return not self.refinements and any(self.metadata.sizes.refinements[: self.count])

    def check(self) -> None:
        """Refuses bytes that are not as they were written.

        Raises:
            CorruptChunk: they do not match their checksums.
        """
        check_encoded(self.bases, self.refinements, self.metadata, 0, self.count)

    def decode_into(self, layout: ChunkLayout, parts: list[memoryview]) -> None:
        """Decodes the pieces, which were checked, into writable buffers.

        Raises:
            CorruptChunk: the bytes are not as the encoder makes them. The parts are then undefined.
        """
        codec, sizes = self.metadata.codec, self.metadata.sizes
        if codec == CODEC and self.are_rounded:
            decode_base_into(self.bases, sizes, layout, parts)
        else:
            decode_into(codec, self.bases, self.refinements, sizes, layout, parts)


def pieces_of_file(raw: memoryview, key: str, layout: ChunkLayout, count: int) -> EncodedPieces:
    """Returns the first pieces of a whole encoded file, of which only the header is checked.

    Args:
        raw: the file.
        key: of the requested chunk.
        layout: that the model needs.
        count: number of pieces.

    Raises:
        CorruptChunk: it is not what was requested, or not as it was written.
    """
    metadata = check_encoded_header(raw, key, layout)
    payload, sizes = raw[encoded_header_size(layout) :], metadata.sizes
    if payload.nbytes != sizes.nbytes:
        raise CorruptChunk(f"Chunk {key} has {payload.nbytes} payload bytes, its header says {sizes.nbytes}.")
    bases = payload[: sum(sizes.bases[:count])]
    return EncodedPieces(metadata, count, bases, payload[sizes.base_bytes :][: sum(sizes.refinements[:count])])


def decode_file(raw: memoryview, key: str, layout: ChunkLayout, parts: list[memoryview]) -> ChunkMetadata:
    """Checks a whole encoded file and decodes its first pieces.

    Args:
        raw, key, layout: as for `pieces_of_file`.
        parts: where the first pieces go; all, or fewer.

    Raises:
        CorruptChunk: it is not what was requested, or not as it was written.
    """
    pieces = pieces_of_file(raw, key, layout, len(parts))
    pieces.check()
    pieces.decode_into(layout, parts)
    return pieces.metadata.facts


def check_any_file(raw: Buffer, key: str, *, deep: bool = False) -> ChunkMetadata:
    """Verifies a whole chunk file of either form without a model at hand. Returns its metadata.

    Args:
        raw: the file.
        key: by which it is stored.
        deep: whether encoded pieces are decoded and compared with the checksums of what was encoded, too.

    Raises:
        CorruptChunk: the header, the payload's length or a checksum is wrong, or the key differs.
    """
    if is_encoded(raw):
        return check_encoded_file(raw, key, deep=deep).facts
    refuse_newer(raw)
    return check_file(raw, key)


def raw_file(raw: Buffer, key: str) -> Buffer:
    """Returns a chunk file in the raw form, decoded if need be, after checking it.

    Raises:
        CorruptChunk: it is damaged.
    """
    if not is_encoded(raw):
        check_any_file(raw, key)
        return raw
    metadata, layout = parse_encoded_header(raw)
    refuse_inflated(metadata, layout)
    size = header_size(layout)
    whole = memoryview(bytearray(size + layout.nbytes))
    whole[:size] = encode_header(layout, metadata.facts)
    decode_file(memoryview(raw), key, layout, split(whole[size:], layout))
    check_file(whole, key)
    return whole


def says_newer(start: Buffer) -> bool:
    """Returns whether a file that starts so says that it is a chunk of a later format version."""
    return _later_version(start) is not None


def refuse_newer(raw: Buffer) -> None:
    """Refuses a file that says it is a chunk of a later format version.

    Args:
        raw: the header at least, or the first `START_BYTES` if the file does not say so.

    Raises:
        NewerChunk: it does.
        CorruptChunk: it does, but all else is as in a version that is known: the number was damaged.
    """
    told = _later_version(raw)
    if told is None:
        return
    begin, end = told.span(1)
    for version in (FORMAT_VERSION, ENCODED_VERSION):
        if _is_header(bytes(raw[:begin]) + version.encode() + bytes(raw[end:HEADER_BYTES])):
            raise CorruptChunk("The chunk's header does not match its checksum: its format version was changed.")
    raise NewerChunk(f"The chunk is of format version {int(told[1])}, which this cake_hf does not know.")


def _later_version(raw: Buffer) -> re.Match[bytes] | None:
    told = _VERSION.match(bytes(raw[:START_BYTES]))
    return None if told is None or int(told[1]) <= int(ENCODED_VERSION) else told


def _is_header(raw: bytes) -> bool:
    try:
        (parse_encoded_header if is_encoded(raw) else parse_header)(raw)
    except CorruptChunk:
        return False
    return True


def split(payload: memoryview, layout: ChunkLayout) -> list[memoryview]:
    """Returns views of the pieces of a whole payload."""
    parts, end = [], 0
    for size in layout.sizes:
        parts.append(payload[end : end + size])
        end += size
    return parts
