"""Chunks through a lossy method: which pieces are coded, and what becomes of those that cannot be.

Coded are the keys and values of layers that keep each token, in bfloat16, float16 or float32. A piece stays as it is if it has
infinities or NaN, or would get some by decoding, if its largest number is below 2^-81 or not below 2^127, or if it would not
shrink. So do the pieces of sliding windows: what a window holds is the recent part of a prompt, which stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import Buffer, Encoded, EncodedSizes
from cake_hf.chunks.lossy.method import Method, Role, Shape
from cake_hf.chunks.lossy.numbers import all_finite, from_float32, to_float32
from cake_hf.chunks.lossy.scales import NotRepresentable
from cake_hf.errors import CorruptChunk

if TYPE_CHECKING:
    from cake_hf.chunks.lossy.method import Bytes, Numbers

LOSSY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_coded(piece: Piece) -> bool:
    """Returns whether pieces of this kind are coded at all."""
    return piece.dtype in LOSSY_DTYPES and not piece.windowed


def is_values(piece: Piece) -> bool:
    """Returns whether a piece has the values of a layer; otherwise keys, or what an indexer keeps."""
    return piece.name.endswith("values")


def code_chunk(payload: memoryview, layout: ChunkLayout, method: Method) -> Encoded:
    """Encodes a chunk, and replaces its numbers by those that it decodes to.

    Args:
        payload: the layout's pieces, back to back; writable.
        method: the method of encoding.
    """
    if payload.readonly or payload.nbytes != layout.nbytes:
        raise ValueError(f"{payload.nbytes} bytes cannot be coded in place: writable, they are {layout.nbytes}.")
    encoded = None if method.whole is None else method.whole.encode(payload, layout)
    if encoded is not None:
        return encoded
    numbers, at = np.frombuffer(payload, np.uint8), 0
    bases: list[Bytes] = []
    refinements: list[Bytes] = []
    for piece, size in zip(layout.pieces, layout.sizes, strict=True):
        raw = numbers[at : at + size]
        at += size
        coded = _coded(raw, piece, layout, method) if is_coded(piece) else None
        if coded is None:
            bases.append(raw.copy())
            refinements.append(raw[:0])
            continue
        base, refinement, decoded = coded
        raw[:] = decoded
        bases.append(base)
        refinements.append(refinement)
    sizes = EncodedSizes(tuple(one.size for one in bases), tuple(one.size for one in refinements))
    return Encoded(_joined(bases), _joined(refinements), sizes)


def decode_chunk(
    bases: Buffer,
    refinements: Buffer,
    sizes: EncodedSizes,
    layout: ChunkLayout,
    parts: Sequence[memoryview],
    method: Method,
) -> None:
    """Decodes the first pieces of a chunk into writable buffers.

    Args:
        bases: the bases of these pieces, back to back.
        refinements: likewise.
        sizes: the sizes of the whole chunk, checked.
        parts: where the pieces go; as many as are decoded.
        method: by which the chunk is encoded.

    Raises:
        CorruptChunk: the bytes are not as the encoder makes them.
    """
    first, second, count = np.frombuffer(bases, np.uint8), np.frombuffer(refinements, np.uint8), len(parts)
    if tuple([part.nbytes for part in parts]) != layout.sizes[:count]:
        raise ValueError("These are not the sizes and places of that layout's pieces.")
    if (first.size, second.size) != (sum(sizes.bases[:count]), sum(sizes.refinements[:count])):
        raise CorruptChunk("An encoded chunk is not as long as its metadata says.")
    if method.whole is not None and method.whole.decode(bases, refinements, sizes, layout, parts):
        return
    at, end = 0, 0
    for number, part in enumerate(parts):
        base = first[at : at + sizes.bases[number]]
        refinement = second[end : end + sizes.refinements[number]]
        at, end = at + base.size, end + refinement.size
        raw = sizes.is_raw(number, part.nbytes)
        piece = layout.pieces[number]
        decoded = base if raw else _decoded(base, refinement, piece, layout.chunk_size, method)
        np.frombuffer(part, np.uint8)[:] = decoded


def _coded(raw: Bytes, piece: Piece, layout: ChunkLayout, method: Method) -> tuple[Bytes, Bytes, Bytes] | None:
    """Returns base, refinement and what they decode to; None if the piece stays as it is."""
    if not all_finite(raw, piece.dtype):
        return None
    shape = Shape(layout.chunk_size, piece.heads, piece.head_dim)
    try:
        base, refinement = method.encode(to_float32(raw, piece.dtype).reshape(shape), _role(piece, layout.layers))
    except NotRepresentable:
        return None
    if not 0 < base.size + refinement.size < raw.size:
        return None
    decoded = _decoded(base, refinement, piece, layout.chunk_size, method)
    return (base, refinement, decoded) if all_finite(decoded, piece.dtype) else None


def _decoded(base: Bytes, refinement: Bytes, piece: Piece, tokens: int, method: Method) -> Bytes:
    if refinement.size and method.decode_base is None:
        raise CorruptChunk("An encoded piece has a refinement, which its codec does not have.")
    shape = Shape(tokens, piece.heads, piece.head_dim)
    numbers: Numbers = method.decode(base, refinement, shape, _role(piece, 1))
    return from_float32(numbers, piece.dtype)


def _role(piece: Piece, layers: int) -> Role:
    return Role(is_values(piece), min(piece.layer, layers - 1) / layers)


def _joined(parts: list[Bytes]) -> memoryview:
    return np.concatenate([np.empty(0, np.uint8), *parts]).data
