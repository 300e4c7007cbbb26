"""The stored form of an encoded chunk: a safetensors file of format version 3. codec.py has version 2, of chunks as they are.

    8 bytes          header length, little endian
    header           JSON, padded with spaces: metadata + tensor table
    payload          the bases of all pieces, back to back, then their refinements

An encoded piece is two tensors of bytes in the table, NAME.base and NAME.refinement, or the first of them if its codec has no
refinements. A piece that is stored as it is has one tensor of its own dtype and shape. The sizes of encoded pieces vary, but
the header's does not: it follows from the layout, and a whole file is never longer than `most_stored_bytes`. docs/format.md
describes all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cake_hf.chunks.codec import (
    ALIGNMENT,
    CHECKSUM_DIGITS,
    FORMS,
    Buffer,
    ChunkMetadata,
    checksum,
    header_bytes,
)
from cake_hf.chunks.layout import ChunkLayout, Piece, dtype_name, dtype_named, plain_json
from cake_hf.chunks.lossless import CODEC, CODEC_VERSION, EncodedSizes
from cake_hf.chunks.lossy import is_lossy, version_of
from cake_hf.chunks.tensor_table import MAX_EXTENT, MAX_PAYLOAD_BYTES, METADATA
from cake_hf.errors import CorruptChunk, NewerChunk

ENCODED_VERSION = "3"
SHORT_DIGITS = 16
"""Of a checksum of encoded bytes: the first half of what `checksum` returns. It guards against accidents, and the decoded piece
has a whole one."""

MOST_MODEL_BYTES = 256
"""Of a model's name in JSON, without quotes."""

_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)
_RUN = re.compile(r"([1-9]\d{0,5}):([A-Z0-9_]{1,12}):([1-9]\d{0,9}):([1-9]\d{0,9})")
_VALUES = {
    "format": "cake_hf",
    "version": ENCODED_VERSION,
    **FORMS,
    "checksums": r"[0-9a-f]*",
    "model": rf"(?:[ !#-\[\]-~]|\\[ -~]){{0,{MOST_MODEL_BYTES}}}",
    "codec": r"[a-z0-9_]{1,32}",
    "codec_version": r"[0-9]{1,9}",
    "tokens": r"[1-9]\d{0,9}",
    "pieces": r"[A-Z0-9_:,]*",
    "layout": rf"[0-9a-f]{{{CHECKSUM_DIGITS}}}",
    "bases": r"[0-9 ]+",
    "refinements": r"[0-9 ]+",
    "base_checksums": r"[0-9a-f]*",
    "refinement_checksums": r"[0-9a-f]*",
    "header": rf"[0-9a-f]{{{CHECKSUM_DIGITS}}}",
}
_METADATA = re.compile(
    rf'\{{"{METADATA}":\{{' + ",".join(f'"{name}":"(?P<{name}>{form})"' for name, form in _VALUES.items()) + r"\},"
)
"""The metadata as `encode_header` writes it; no other form is accepted."""

_SUFFIXES = (".base", ".refinement")
_ENTRY_BYTES = sum(len(f'{suffix}:{{"dtype":"U8","shape":[],"data_offsets":[,]}},') for suffix in _SUFFIXES)
"""Of a piece's entries in the table, beside its name and the numbers."""


@dataclass(frozen=True)
class EncodedMetadata:
    """An encoded chunk's description of itself.

    Attributes:
        facts: what every chunk says; the checksums are those of the decoded pieces.
        sizes: the sizes of the encoded pieces.
        base_checksums: the checksums of all bases, `SHORT_DIGITS` hexadecimal digits each.
        refinement_checksums: the checksums of all refinements.
        codec: by which they are encoded.
    """

    facts: ChunkMetadata
    sizes: EncodedSizes
    base_checksums: str
    refinement_checksums: str
    codec: str = CODEC


def encoded_header_size(layout: ChunkLayout) -> int:
    """Returns the bytes before the payload of an encoded chunk. They depend on the layout alone."""
    size_digits, offset_digits = len(str(max(layout.sizes, default=0))), len(str(layout.nbytes))
    entries = _ENTRY_BYTES + 2 * (size_digits + 2 * offset_digits)
    values = 2 * (size_digits + 1) + CHECKSUM_DIGITS + 2 * SHORT_DIGITS
    table = 2 * layout.name_bytes + len(layout.pieces) * (entries + values)
    return -(-(8 + _FIXED_BYTES + len(layout.runs) + table) // ALIGNMENT) * ALIGNMENT


def most_stored_bytes(layout: ChunkLayout) -> int:
    """Returns the most bytes that an encoded chunk may have as a file: with no piece that shrinks."""
    return encoded_header_size(layout) + layout.nbytes


def encode_header(layout: ChunkLayout, metadata: EncodedMetadata) -> bytes:
    """Returns the bytes that precede the payload: `encoded_header_size(layout)` of them."""
    facts, sizes = metadata.facts, metadata.sizes
    values = {
        "format": "cake_hf",
        "version": ENCODED_VERSION,
        "key": facts.key,
        "parent": facts.parent,
        "index": str(facts.index),
        "namespace": facts.namespace,
        "model": _shortened(facts.model),
        "checksums": "".join(facts.checksums),
        "codec": metadata.codec,
        "codec_version": _version(metadata.codec),
        "tokens": str(layout.chunk_size),
        "pieces": layout.runs,
        "layout": layout.digest,
        "bases": " ".join(map(str, sizes.bases)),
        "refinements": " ".join(map(str, sizes.refinements)),
        "base_checksums": metadata.base_checksums,
        "refinement_checksums": metadata.refinement_checksums,
        "header": "",
    }
    begin, end = f'{{"{METADATA}":{plain_json(values)[:-2]}', f'"}},{_table(layout, sizes)}'
    nbytes = encoded_header_size(layout)
    text = f"{begin}{checksum((begin + end).encode())}{end}".encode()
    assert len(text) <= nbytes - 8  # see encoded_header_size
    return (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)


def is_encoded(raw: Buffer) -> bool:
    """Returns whether a file that starts so claims to be an encoded chunk of this format version."""
    return bytes(raw[8:80]).startswith(f'{{"{METADATA}":{{"format":"cake_hf","version":"{ENCODED_VERSION}",'.encode())


def check_encoded_header(raw: Buffer, key: str, layout: ChunkLayout) -> EncodedMetadata:
    """Refuses an encoded chunk that is not exactly the requested one, in the layout that the model needs. Returns its metadata.

    Args:
        raw: the file's first `encoded_header_size(layout)` bytes, or more.
        key: the key of the requested chunk.
        layout: that the model needs.

    Raises:
        CorruptChunk: another key, other tensors, or not a header that can be trusted.
    """
    written, _ = _sealed(raw)
    if written["key"] != key:
        raise CorruptChunk(f"Asked for chunk {key}, got {written['key']!r}.")
    if written["layout"] != layout.digest or written["tokens"] != str(layout.chunk_size):
        raise CorruptChunk(f"Chunk {key} holds other tensors than the model's KV.")
    return _metadata(written, layout, raw)


def parse_encoded_header(raw: Buffer) -> tuple[EncodedMetadata, ChunkLayout]:
    """Returns metadata and layout from the start of an encoded chunk, without a model at hand; trusts nothing in it.

    The layout's pieces have their names, shapes and dtypes; to which layers they belong is not stored.

    Raises:
        CorruptChunk: not a header of this format and version, or not as it was written.
    """
    written, table = _sealed(raw)
    try:
        layout = _described(written, list(json.loads(f"{{{table}")))
    except _UNREADABLE as error:
        raise CorruptChunk(f"The chunk's header cannot be read ({type(error).__name__}).") from error
    metadata = _metadata(written, layout, raw)
    if written["layout"] != layout.digest or table != _table(layout, metadata.sizes):
        raise CorruptChunk(f"The header of chunk {written['key']} contradicts itself.")
    return metadata, layout


def _table(layout: ChunkLayout, sizes: EncodedSizes) -> str:
    """Returns the members of the tensor table and the closing brace, as written in a header."""
    first, second = [], []
    at, end = 0, sizes.base_bytes
    for n, (name, base, refinement) in enumerate(zip(layout.json_names, sizes.bases, sizes.refinements, strict=True)):
        if not sizes.is_raw(n, layout.sizes[n]):
            first.append(f'"{name}.base":{{"dtype":"U8","shape":[{base}],"data_offsets":[{at},{at + base}]}}')
            offsets = f'"data_offsets":[{end},{end + refinement}]'
            if refinement:
                second.append(f'"{name}.refinement":{{"dtype":"U8","shape":[{refinement}],{offsets}}}')
        else:
            piece, offsets = layout.pieces[n], f'"data_offsets":[{at},{at + base}]'
            shape = f"[{layout.chunk_size},{piece.heads},{piece.head_dim}]"
            first.append(f'"{name}":{{"dtype":"{dtype_name(piece.dtype)}","shape":{shape},{offsets}}}')
        at, end = at + base, end + refinement
    return ",".join(first + second) + "}"


def _described(written: re.Match[str], names: Sequence[str]) -> ChunkLayout:
    """Returns the layout that metadata describes; raises one of `_UNREADABLE` if it describes none.

    Args:
        written: the metadata.
        names: the names of the tensors, in order: the first ones are those of bases, and of pieces as they are.
    """
    pieces: list[Piece] = []
    tokens = int(written["tokens"])
    stored = list(zip(written["bases"].split(" "), written["refinements"].split(" "), strict=True))
    for run in written["pieces"].split(","):
        parts = _RUN.fullmatch(run)
        if parts is None:
            raise ValueError("a run of pieces is not of its form")
        count, dtype, heads, head_dim = parts.groups()
        piece = Piece("", int(heads), int(head_dim), dtype_named(dtype))
        if max(tokens, piece.heads, piece.head_dim) >= MAX_EXTENT or tokens * piece.token_bytes >= MAX_PAYLOAD_BYTES:
            raise ValueError("a piece is too large")
        run_of = slice(len(pieces), len(pieces) + int(count))
        if run_of.stop > min(len(names), len(stored)):
            raise ValueError("there are fewer tensors than pieces")
        raw = (str(tokens * piece.token_bytes), "0")
        named = zip(names[run_of], stored[run_of], strict=True)
        pieces += [replace(piece, name=name if at == raw else name.removesuffix(_SUFFIXES[0])) for name, at in named]
    return ChunkLayout(tokens, tuple(pieces))


def _sealed(raw: Buffer) -> tuple[re.Match[str], str]:
    """Returns the metadata, and the tensor table's members with the closing brace, of a header that is as it was written.

    Raises:
        CorruptChunk: it is not, or the chunk has another format, version or codec.
    """
    text = header_bytes(raw).decode("latin-1").rstrip(" ")
    written = _METADATA.match(text)
    if written is None:
        raise CorruptChunk("The file is not an encoded chunk of this format version.")
    begin, end = written.span("header")
    if checksum((text[:begin] + text[end:]).encode("latin-1")) != written["header"]:
        raise CorruptChunk("The chunk's header does not match its checksum.")
    codec = written["codec"], written["codec_version"]
    if codec[1] != _version(codec[0]):
        raise NewerChunk(
            f"The chunk is encoded by version {codec[1]} of {codec[0]!r}, which this cake_hf does not know."
        )
    return written, text[written.end() :]


def _metadata(written: re.Match[str], layout: ChunkLayout, raw: Buffer) -> EncodedMetadata:
    """Returns the metadata of a chunk of that layout.

    Raises:
        CorruptChunk: its values, or the header's length, do not fit the layout.
    """
    digits, count = written["checksums"], len(layout.pieces)
    try:
        model = json.loads(f'"{written["model"]}"')
        sizes = EncodedSizes(*(tuple(map(int, written[name].split(" "))) for name in ("bases", "refinements")))
    except ValueError as error:
        raise CorruptChunk(f"The chunk's header cannot be read ({type(error).__name__}).") from error
    found = EncodedMetadata(
        ChunkMetadata(
            key=written["key"],
            parent=written["parent"],
            index=int(written["index"]),
            namespace=written["namespace"],
            model=model,
            checksums=tuple([digits[at : at + CHECKSUM_DIGITS] for at in range(0, len(digits), CHECKSUM_DIGITS)]),
        ),
        sizes,
        written["base_checksums"],
        written["refinement_checksums"],
        written["codec"],
    )
    sizes.check(layout, lossy=is_lossy(found.codec))
    short = {len(found.base_checksums), len(found.refinement_checksums)}
    if len(digits) != count * CHECKSUM_DIGITS or short != {count * SHORT_DIGITS}:
        raise CorruptChunk(f"Chunk {written['key']} has checksums of another number of pieces.")
    if int.from_bytes(bytes(raw[:8]), "little") + 8 != encoded_header_size(layout):
        raise CorruptChunk(f"Chunk {written['key']} has a header of another length.")
    return found


def _version(codec: str) -> str | None:
    """Returns the version of a codec; None if there is none of that name."""
    return CODEC_VERSION if codec == CODEC else version_of(codec)


def _shortened(model: str) -> str:
    """Returns the end of a model's name that has at most `MOST_MODEL_BYTES` in JSON, with text only in it."""
    name = model[-MOST_MODEL_BYTES:].encode(errors="replace").decode()
    while len(plain_json(name)) > MOST_MODEL_BYTES + 2:
        name = name[1:]
    return name


_FIXED_BYTES = len(plain_json({METADATA: dict.fromkeys(_VALUES, "")})) + sum(
    {"key": 40, "parent": 40, "namespace": 40, "index": 18, "model": MOST_MODEL_BYTES, "tokens": 10, "layout": 32}.get(name, 0)
    for name in _VALUES
) + len("cake_hf" + ENCODED_VERSION + CODEC + CODEC_VERSION) + CHECKSUM_DIGITS  # fmt: skip
"""Of the metadata's values that are there once, at most; with all names and punctuation. (A longer name of a codec takes room
that the index does not need: no prompt has 10^17 chunks.)"""
