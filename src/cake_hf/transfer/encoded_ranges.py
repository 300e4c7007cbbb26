"""Reads of a part of an encoded chunk: its first pieces, its bases alone, or the refinements that were left out."""

from __future__ import annotations

from cake_hf.chunks.encoded_checks import check_refinements
from cake_hf.chunks.encoded_header import EncodedMetadata, check_encoded_header, encoded_header_size
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.stored_forms import EncodedPieces
from cake_hf.scheduling.costs import BASE_SHARE
from cake_hf.stores.base import Store


def read_first_pieces(
    store: Store, key: str, layout: ChunkLayout, room: memoryview, count: int, *, bases_alone: bool
) -> tuple[EncodedPieces, int] | None:
    """Reads header and bases of a chunk's first pieces, in one read as a rule, and their refinements; None for a miss.

    Only the header is checked. Also returns how many bytes were read.

    Args:
        store: to read from.
        room: for at least the largest chunk of that layout.
        count: how many of its first pieces are wanted.
        bases_alone: leave out the refinements.

    Raises:
        CorruptChunk: it is not an encoded chunk, or not the requested one, or it is damaged.
        StoreError: it cannot be read.
    """
    start = encoded_header_size(layout)
    likely = start + int(BASE_SHARE * sum(layout.sizes[:count]))
    if not store.read_range(key, [room[:likely]], 0):
        return None
    metadata = check_encoded_header(room[:start], key, layout)
    sizes = metadata.sizes
    middle = start + sum(sizes.bases[:count])
    if middle > likely and not store.read_range(key, [room[likely:middle]], likely):
        return None
    end = middle + (0 if bases_alone else sum(sizes.refinements[:count]))
    refinements = room[middle:end]
    if refinements and not store.read_range(key, [refinements], start + sizes.base_bytes):
        return None
    pieces = EncodedPieces(metadata, count, room[start:middle], refinements)
    return pieces, max(likely, middle) + len(refinements)


def read_refinements(store: Store, layout: ChunkLayout, metadata: EncodedMetadata, count: int) -> memoryview | None:
    """Reads and checks the refinements of a chunk's first pieces, back to back; None for a miss.

    Args:
        store: to read from.
        metadata: the metadata of the chunk, as it was when its bases were read.
        count: how many of its first pieces are wanted.

    Raises:
        CorruptChunk: the chunk was replaced by another form meanwhile, or is damaged.
        StoreError: it cannot be read.
    """
    sizes = metadata.sizes
    found = memoryview(bytearray(sum(sizes.refinements[:count])))
    if not store.read_range(metadata.facts.key, [found], encoded_header_size(layout) + sizes.base_bytes):
        return None
    check_refinements(found, metadata, 0, count)
    return found
