"""Decodes chunks of format version 3, whichever codec they are encoded by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cake_hf.chunks import lossless
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import CODEC, Buffer, EncodedSizes
from cake_hf.chunks.lossy import lossy_method, piece_decoder
from cake_hf.errors import CorruptChunk


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
        bases: of these pieces, back to back.
        refinements: likewise.
        sizes: of the whole chunk, checked.
        layout: of the chunk.
        parts: where the pieces go; as many as are decoded.

    Raises:
        CorruptChunk: the bytes are not as the encoder makes them. The parts are then undefined; nothing else was written to.
        CakeError: the codec needs a library that is not installed.
    """
    if codec == CODEC:
        lossless.decode_into(bases, refinements, sizes, layout, parts)
        return
    method = lossy_method(codec)
    if method.decode_chunk is not None and all(layout.channels) and not any(sizes.refinements):
        method.decode_chunk(bases, sizes, layout, parts)
        return
    decode = piece_decoder(method)
    first, second = np.frombuffer(bases, np.uint8), np.frombuffer(refinements, np.uint8)
    count, at, end = len(parts), 0, 0
    if (first.size, second.size) != (sum(sizes.bases[:count]), sum(sizes.refinements[:count])):
        raise CorruptChunk("An encoded chunk is not as long as its metadata says.")
    for number, part in enumerate(parts):
        base = first[at : at + sizes.bases[number]]
        refinement = second[end : end + sizes.refinements[number]]
        at, end = at + base.size, end + refinement.size
        if sizes.is_raw(number, part.nbytes):
            np.frombuffer(part, np.uint8)[:] = base
        else:
            decode(base, refinement, layout.pieces[number], layout.chunk_size, part)
