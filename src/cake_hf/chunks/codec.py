"""The stored form of a chunk: a safetensors file, checked before any byte of it is used.

    8 bytes          header length, little endian
    header           JSON, padded with spaces so that the payload starts on a page: tensor table + metadata
    payload          the layout's pieces, back to back

The metadata has a checksum of each piece, so that a part of a chunk can be read and checked by itself, and one checksum of
everything else in the header.

All chunks of one layout have headers of the same length. A reader therefore knows the shape of the whole file beforehand and
reads header and payload, scattered to their destinations, in one pass.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import xxhash

from cake_hf.chunks.layout import ChunkLayout, plain_json, sorted_json
from cake_hf.chunks.tensor_table import LONGEST_KNOWN, METADATA, TensorTable, checked_table, known_table
from cake_hf.errors import CorruptChunk

FORMAT_VERSION = "2"
ALIGNMENT = 4096
MAX_HEADER_BYTES = 2**20
"""No header of this library comes near this size; a larger one is refused before memory is allocated for it."""

MAX_MODEL_NAME = 128
METADATA_ROOM = 2048
"""Enough for all metadata except the pieces' checksums: 350 bytes, an index, and a model name of characters that JSON escapes
to 12 bytes each."""

CHECKSUM_DIGITS = 32

LITTLE_BYTES = 2**18
"""A checksum of this many bytes that were just read takes about 10 microseconds."""

_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

Buffer = bytes | bytearray | memoryview

FORMS = {
    "key": r"[0-9a-f]{40}",
    "parent": r"[0-9a-f]{40}",
    "index": r"0|[1-9][0-9]{0,17}",
    "namespace": r"[0-9a-f]{40}",
    "model": rf"(?s:.){{0,{MAX_MODEL_NAME}}}",
    "checksums": rf"(?:[0-9a-f]{{{CHECKSUM_DIGITS}}})*",
}
"""The forms of the metadata values, in writing order. A namespace is a digest, like a key. An index fits 64 bits."""

_PATTERNS = {name: re.compile(form) for name, form in FORMS.items()}

_UNESCAPED = rf"[ !#-\[\]-~]{{0,{MAX_MODEL_NAME}}}"
"""A name whose characters JSON does not escape."""

_USUAL = re.compile(
    r'\{"__metadata__":\{'
    + ",".join(
        f'"{name}":"(?P<{name}>{form})"'
        for name, form in {
            "format": "cake_hf",
            "version": FORMAT_VERSION,
            **FORMS,
            "model": _UNESCAPED,
            "header": rf"[0-9a-f]{{{CHECKSUM_DIGITS}}}",
        }.items()
    )
    + r"\}"
)
"""The metadata as `encode_header` writes it."""


@dataclass(frozen=True)
class ChunkMetadata:
    """A chunk's description of itself, beside its tensors.

    Attributes:
        key: its key in the store.
        parent: key of the chunk before it; the namespace for chunk 0.
        index: its position on the absolute grid.
        namespace: digest of what makes KV interchangeable.
        model: the model's name, for human readers only.
        checksums: xxh3-128 of each piece of the payload, 32 hexadecimal digits.
    """

    key: str
    parent: str
    index: int
    namespace: str
    model: str
    checksums: tuple[str, ...] = ()


Checksum = xxhash.xxh3_128
"""The incremental form of `checksum`, for data that arrives in steps."""


def checksum(data: Buffer) -> str:
    """Returns the xxh3-128 digest; guards against accidents, not against an adversary.

    Large data is hashed while other threads run; for small data, letting them run costs more than the hashing.
    """
    if len(data) <= LITTLE_BYTES:
        return xxhash.xxh3_128_hexdigest(data)
    digest = xxhash.xxh3_128()
    digest.update(data)  # this call releases the GIL
    return digest.hexdigest()


def checksums(payload: Buffer, layout: ChunkLayout) -> tuple[str, ...]:
    """Returns the checksum of each piece of a whole payload."""
    return checksums_between(payload, [0, *accumulate(layout.sizes)])


def checksums_between(data: Buffer, edges: Sequence[int]) -> tuple[str, ...]:
    """Returns the checksum of each part of the data, from one of the edges to the next."""
    view = memoryview(data)
    return tuple(checksum(view[start:end]) for start, end in pairwise(edges))


def encode_header(layout: ChunkLayout, facts: ChunkMetadata) -> bytes:
    """Returns the bytes that precede the payload: `header_size(layout)` of them."""
    metadata = {
        "format": "cake_hf",
        "version": FORMAT_VERSION,
        "key": facts.key,
        "parent": facts.parent,
        "index": str(facts.index),
        "namespace": facts.namespace,
        # A path may hold bytes that are not text (lone surrogates here); safetensors refuses a header with those.
        "model": facts.model[-MAX_MODEL_NAME:].encode(errors="replace").decode(),
        "checksums": "".join(facts.checksums),
    }
    return sealed_header(metadata, layout.tensor_table, header_size(layout))


def sealed_header(metadata: Mapping[str, object], table: Mapping[str, object], nbytes: int) -> bytes:
    """Returns a header of `nbytes` bytes with a checksum of everything in it.

    Args:
        metadata: without that checksum.
        table: the table of the tensors.
        nbytes: including the 8 bytes of the length; at least as many as the header needs.
    """
    whole = {METADATA: {**metadata, "header": _seal(metadata, sorted_json(table))}, **table}
    return struct.pack("<Q", nbytes - 8) + plain_json(whole).encode().ljust(nbytes - 8)


def header_size(layout: ChunkLayout) -> int:
    """Returns the bytes before the payload. They depend on the layout alone, so a reader knows them before reading."""
    table = len(layout.table_json) + CHECKSUM_DIGITS * len(layout.pieces)
    return -(-(8 + table + METADATA_ROOM) // ALIGNMENT) * ALIGNMENT


def stored_bytes(layout: ChunkLayout) -> int:
    """Returns the size of a whole file in bytes: header and payload."""
    return header_size(layout) + layout.nbytes


def parse_header(raw: Buffer) -> tuple[ChunkMetadata, TensorTable]:
    """Returns metadata and tensor table from the start of a file; trusts nothing in it.

    Args:
        raw: at least the 8 length bytes and the header; what follows is ignored.

    Raises:
        CorruptChunk: not a header of this format and version, or not as it was written.
    """
    written = header_bytes(raw)
    try:
        return _recognised(written) or _parsed(written)
    except _UNREADABLE as error:
        raise CorruptChunk(f"The chunk's header cannot be read ({type(error).__name__}).") from error


def header_bytes(raw: Buffer) -> bytes:
    """Returns the JSON of the header at the start of a file, with its padding.

    Raises:
        CorruptChunk: the file does not begin with a header of plausible length.
    """
    if len(raw) < 8:
        raise CorruptChunk("The chunk is shorter than a header.")
    (length,) = struct.unpack("<Q", bytes(raw[:8]))
    if length > MAX_HEADER_BYTES or length > len(raw) - 8:
        raise CorruptChunk(f"The chunk's header claims {length} bytes.")
    return bytes(raw[8 : 8 + length])


def check_header(raw: Buffer, key: str, layout: ChunkLayout) -> ChunkMetadata:
    """Refuses a chunk that is not exactly the requested one, in the layout that the model needs. Returns its metadata.

    Raises:
        CorruptChunk: another key, other tensors, or not a header that can be trusted.
    """
    facts, table = _usual_header(raw, layout) or parse_header(raw)
    if facts.key != key:
        raise CorruptChunk(f"Asked for chunk {key}, got {facts.key[:40]!r}.")
    if table != layout.tensor_table or len(facts.checksums) != len(layout.pieces):
        raise CorruptChunk(f"Chunk {key} holds other tensors than the model's KV.")
    return facts


def check_pieces(pieces: Sequence[Buffer], facts: ChunkMetadata, first: int = 0) -> None:
    """Refuses pieces that are not as they were written.

    Args:
        pieces: consecutive pieces of the chunk, in order.
        facts: the chunk's metadata.
        first: number of the first of these pieces in the chunk.

    Raises:
        CorruptChunk: a piece does not match its checksum.
    """
    for piece, expected in zip(pieces, facts.checksums[first : first + len(pieces)], strict=True):
        if checksum(piece) != expected:
            raise CorruptChunk(f"Chunk {facts.key} does not match its checksum.")


def check_file(raw: Buffer, key: str) -> ChunkMetadata:
    """Verifies a whole chunk file without a model at hand. Returns its metadata.

    Raises:
        CorruptChunk: the header, the payload's length or its checksum is wrong, or the key differs.
    """
    facts, table = parse_header(raw)
    view = memoryview(raw)
    (length,) = struct.unpack("<Q", bytes(view[:8]))
    payload = view[8 + length :]
    if facts.key != key:
        raise CorruptChunk(f"The file named {key} says that it is {facts.key[:40]!r}.")
    if len(payload) != table.payload_bytes:
        raise CorruptChunk(f"Chunk {key} has {len(payload)} payload bytes, its header says {table.payload_bytes}.")
    spans = spans_of(facts, table)
    check_pieces([payload[start:end] for start, end in spans], facts)
    return facts


def spans_of(facts: ChunkMetadata, table: TensorTable) -> list[tuple[int, int]]:
    """Returns start and end of each piece in the payload, in bytes, in the order of the checksums.

    Raises:
        CorruptChunk: the number of pieces differs from the number of checksums.
    """
    if len(facts.checksums) != len(table.spans):
        raise CorruptChunk(f"Chunk {facts.key} has {len(table.spans)} tensors and {len(facts.checksums)} checksums.")
    return table.spans


def _usual_header(raw: Buffer, layout: ChunkLayout) -> tuple[ChunkMetadata, Mapping[str, object]] | None:
    """Returns what `parse_header` returns, for a header that is word for word as `encode_header` writes it; None for any other.

    All good chunks have such headers, unless their model's name has unusual characters. Nothing in them has to be parsed, which
    matters if chunks are small.
    """
    text = bytes(raw[8:]).decode("latin-1")
    written = _USUAL.match(text)
    if written is None or int.from_bytes(raw[:8], "little") != len(text):
        return None
    if text[written.end() :] != f",{layout.table_json[1:]}".ljust(len(text) - written.end()):
        return None
    facts = _usual_facts(written, layout.sorted_table_json)
    return None if facts is None else (facts, layout.tensor_table)


def _recognised(raw: bytes) -> tuple[ChunkMetadata, TensorTable] | None:
    """Returns what `_parsed` returns, in a tenth of the time if other chunks have the same table.

    None unless the metadata is written as `encode_header` writes it and everything is valid.
    """
    text = raw.decode("latin-1")
    written = _USUAL.match(text)
    if written is None or not raw.isascii():
        return None
    begin, end = written.end(), text.rindex("}") + 1
    if not text.startswith(",", begin) or text[end:] != " " * (len(text) - end) or end - begin > LONGEST_KNOWN:
        return None
    try:
        table = known_table(text[begin + 1 : end])
    except _UNREADABLE:
        return None
    facts = _usual_facts(written, table.sorted_json)
    return None if facts is None else (facts, table)


def _parsed(raw: bytes) -> tuple[ChunkMetadata, TensorTable]:
    """Returns metadata and tensor table of a header; raises one of `_UNREADABLE` if it is invalid.

    Raises:
        CorruptChunk: another format or version, or not as it was written.
    """
    table = json.loads(raw)
    facts = _sealed_facts(table.pop(METADATA), sorted_json(table))
    return facts, checked_table(table)


def _usual_facts(written: re.Match[str], table: str) -> ChunkMetadata | None:
    """Returns the metadata from text that `_USUAL` matched; None if it is not as it was written."""
    metadata = written.groupdict()
    seal = metadata.pop("header")
    # Sorted JSON without the encoder: none of these values has a character that JSON would escape.
    words = ",".join([f'"{name}":"{metadata[name]}"' for name in sorted(metadata)])
    return _facts(metadata) if seal == checksum(f"[{{{words}}},{table}]".encode()) else None


def _sealed_facts(metadata: dict[str, object], table: str) -> ChunkMetadata:
    """Returns the metadata of a header; raises one of `_UNREADABLE` if it is incomplete or malformed.

    Raises:
        CorruptChunk: another format or version, or not as it was written.
    """
    if (metadata["format"], metadata["version"]) != ("cake_hf", FORMAT_VERSION):
        raise CorruptChunk("The file is not a chunk of this format version.")
    if metadata.pop("header") != _seal(metadata, table):
        raise CorruptChunk("The chunk's header does not match its checksum.")
    words: dict[str, str] = {}
    for name, pattern in _PATTERNS.items():
        word = metadata[name]
        if not isinstance(word, str) or not pattern.fullmatch(word):
            raise ValueError(f"{name} is not of its form")
        words[name] = word
    return _facts(words)


def _facts(words: Mapping[str, str]) -> ChunkMetadata:
    """Builds the metadata from values of the right form."""
    digits = words["checksums"]
    return ChunkMetadata(
        key=words["key"],
        parent=words["parent"],
        index=int(words["index"]),
        namespace=words["namespace"],
        model=words["model"],
        checksums=tuple([digits[at : at + CHECKSUM_DIGITS] for at in range(0, len(digits), CHECKSUM_DIGITS)]),
    )


def _seal(metadata: Mapping[str, object], table: str) -> str:
    """Returns the checksum of everything in a header, regardless of order and whitespace; the table is given as sorted JSON."""
    return checksum(f"[{sorted_json(metadata)},{table}]".encode())
