"""Checks of encoded chunks: of their bytes before they are decoded, and of whole files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from cake_hf.chunks.codec import Buffer, ChunkMetadata, checksum
from cake_hf.chunks.decoding import decode_into
from cake_hf.chunks.encoded_header import SHORT_DIGITS, EncodedMetadata, encoded_header_size, parse_encoded_header
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import CODEC, Encoded
from cake_hf.errors import CorruptChunk

MOST_INFLATED = 32
"""A lossy codec makes at most this many bytes of one; the lossless one makes two."""


def describe(facts: ChunkMetadata, encoded: Encoded, codec: str = CODEC) -> EncodedMetadata:
    """Returns the metadata of an encoded chunk."""
    bases = _short_checksums(encoded.bases, encoded.sizes.bases)
    return EncodedMetadata(
        facts, encoded.sizes, bases, _short_checksums(encoded.refinements, encoded.sizes.refinements), codec
    )


def stored_pieces(metadata: EncodedMetadata) -> list[tuple[int, str]]:
    """Returns the bytes of each base and then of each refinement, in the order of the payload, and their checksums' digits."""
    sizes, digits = metadata.sizes, metadata.base_checksums + metadata.refinement_checksums
    return [
        (size, digits[n * SHORT_DIGITS : (n + 1) * SHORT_DIGITS])
        for n, size in enumerate([*sizes.bases, *sizes.refinements])
    ]


def check_encoded(
    bases: Buffer, refinements: Buffer, metadata: EncodedMetadata, first: int = 0, count: int = 2**31
) -> None:
    """Refuses encoded bytes that are not as they were written: to be called before they are decoded.

    Args:
        bases: the bases of `count` consecutive pieces, back to back.
        refinements: likewise; empty if the bases alone are decoded.
        first: number of the first of these pieces in the chunk.
        count: of pieces; all that follow by default.

    Raises:
        CorruptChunk: they do not match their checksums.
    """
    digits = slice(first * SHORT_DIGITS, (first + count) * SHORT_DIGITS)
    if _short_checksums(bases, metadata.sizes.bases[first : first + count]) != metadata.base_checksums[digits]:
        raise CorruptChunk(f"Chunk {metadata.facts.key} does not match its checksum.")
    if len(refinements):
        check_refinements(refinements, metadata, first, count)


def check_refinements(refinements: Buffer, metadata: EncodedMetadata, first: int = 0, count: int = 2**31) -> None:
    """Refuses refinements that are not as they were written; see `check_encoded`.

    Raises:
        CorruptChunk: they do not match their checksums.
    """
    digits = slice(first * SHORT_DIGITS, (first + count) * SHORT_DIGITS)
    found = _short_checksums(refinements, metadata.sizes.refinements[first : first + count])
    if found != metadata.refinement_checksums[digits]:
        raise CorruptChunk(f"Chunk {metadata.facts.key} does not match its checksum.")


def check_encoded_file(raw: Buffer, key: str, *, deep: bool = False) -> EncodedMetadata:
    """Verifies a whole encoded file without a model at hand. Returns its metadata.

    Args:
        raw: the file.
        key: by which it is stored.
        deep: whether the pieces are decoded and compared with their checksums, too.

    Raises:
        CorruptChunk: the header, the payload's length or a checksum is wrong, or the key differs.
    """
    metadata, layout = parse_encoded_header(raw)
    view, sizes = memoryview(raw), metadata.sizes
    payload = view[encoded_header_size(layout) :]
    if metadata.facts.key != key:
        raise CorruptChunk(f"The file named {key} says that it is {metadata.facts.key[:40]!r}.")
    if len(payload) != sizes.nbytes:
        raise CorruptChunk(f"Chunk {key} has {len(payload)} payload bytes, its header says {sizes.nbytes}.")
    bases, refinements = payload[: sizes.base_bytes], payload[sizes.base_bytes :]
    check_encoded(bases, refinements, metadata)
    if deep:
        refuse_inflated(metadata, layout)
        parts = [memoryview(bytearray(size)) for size in layout.sizes]
        decode_into(metadata.codec, bases, refinements, sizes, layout, parts)
        if tuple(map(checksum, parts)) != metadata.facts.checksums:
            raise CorruptChunk(f"Chunk {key} decodes to other KV than was encoded.")
    return metadata


def refuse_inflated(metadata: EncodedMetadata, layout: ChunkLayout) -> None:
    """Refuses a chunk that claims to decode to more than the codec can make of it, before memory is taken for that.

    Raises:
        CorruptChunk: it does. Of the lossless codec, an encoded number has at least 8 of its 16 bits in the base.
    """
    if layout.nbytes > (2 if metadata.codec == CODEC else MOST_INFLATED) * metadata.sizes.nbytes:
        raise CorruptChunk(f"Chunk {metadata.facts.key} cannot decode to {layout.nbytes} bytes.")


def _short_checksums(data: Buffer, sizes: Sequence[int]) -> str:
    view, ends = memoryview(data), accumulate(sizes)
    return "".join([checksum(view[end - size : end])[:SHORT_DIGITS] for end, size in zip(ends, sizes, strict=True)])
