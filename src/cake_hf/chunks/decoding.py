"""Decodes chunks of format version 3, whichever codec they are encoded by."""

from __future__ import annotations

from collections.abc import Sequence

from cake_hf.chunks import lossless
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import CODEC, Buffer, EncodedSizes
from cake_hf.chunks.lossy import decode_chunk, lossy_method


def decode_into(
    codec: str,
    bases: Buffer,
    refinements: Buffer,
    sizes: EncodedSizes,
    layout: ChunkLayout,
    parts: Sequence[memoryview],
) -> None:
    """Decodes the first pieces of a chunk into writable buffers.

    Args:
        codec: by which the chunk is encoded; a known one.
        bases: the bases of these pieces, back to back.
        refinements: likewise.
        sizes: the sizes of the whole chunk, checked.
        parts: where the pieces go; as many as are decoded.

    Raises:
        CorruptChunk: the bytes are not as the encoder makes them. The parts are then undefined; nothing else was written to.
        CakeError: the codec needs a library that is not installed.
    """
    if codec == CODEC:
        lossless.decode_into(bases, refinements, sizes, layout, parts)
        return
    decode_chunk(bases, refinements, sizes, layout, parts, lossy_method(codec))
