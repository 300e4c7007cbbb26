"""`near`: the 8-bit base of the lossless codec (`chunks/lossless.py`, docs/format.md): sign, exponent, 4 bits of mantissa.

Numbers of other dtypes are rounded to bfloat16 first. A bfloat16 is then wrong by at most 1/32 of itself (`lossless.rounded`);
rounding twice changes nothing more. It is the only codec here whose error does not depend on a number's neighbours.

Bytes: as the lossless codec's base.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import Buffer, Encoded, EncodedSizes, decode_base_into, encode
from cake_hf.chunks.lossy.coding import is_coded
from cake_hf.chunks.lossy.method import Method, Role, Shape
from cake_hf.chunks.lossy.numbers import all_finite, from_float32, to_float32
from cake_hf.chunks.lossy.scales import NotRepresentable
from cake_hf.errors import CorruptChunk

if TYPE_CHECKING:
    from cake_hf.chunks.lossy.method import Bytes, Numbers


def _encode(numbers: Numbers, role: Role) -> tuple[Bytes, Bytes]:
    layout = _layout(Shape(*numbers.shape))
    encoded = encode(from_float32(numbers, torch.bfloat16).data, layout)
    if not encoded.refinements.nbytes:
        raise NotRepresentable  # it would not shrink
    return np.frombuffer(encoded.bases, np.uint8), np.empty(0, np.uint8)


def _decode(base: Bytes, refinement: Bytes, shape: Shape, role: Role) -> Numbers:
    layout = _layout(shape)
    numbers = shape.tokens * shape.channels
    if not numbers <= base.size < 2 * numbers:
        raise CorruptChunk("An encoded piece has another number of codes than the model's KV.")
    decoded = np.empty(layout.nbytes, np.uint8)
    _decode_bases(base.data, EncodedSizes((base.size,), (0,)), layout, [decoded.data])
    return to_float32(decoded, torch.bfloat16).reshape(shape)


class _WholeChunks:
    """The base of the lossless codec, for chunks of bfloat16 KV."""

    def encode(self, payload: memoryview, layout: ChunkLayout) -> Encoded | None:
        """See `method.WholeChunks`: the KV must be finite, and all pieces must be coded and shrink."""
        numbers = np.frombuffer(payload, np.uint8)
        if not all(map(is_coded, layout.pieces)) or not all(layout.channels) or not all_finite(numbers, torch.bfloat16):
            return None
        encoded = encode(payload, layout)
        if not all(encoded.sizes.refinements):
            return None
        sizes, ends = EncodedSizes(encoded.sizes.bases, (0,) * len(layout.pieces)), accumulate(layout.sizes)
        parts = [payload[end - size : end] for end, size in zip(ends, layout.sizes, strict=True)]
        _decode_bases(encoded.bases, sizes, layout, parts)
        return Encoded(encoded.bases, memoryview(b""), sizes)

    def decode(
        self, bases: Buffer, refinements: Buffer, sizes: EncodedSizes, layout: ChunkLayout, parts: Sequence[memoryview]
    ) -> bool:
        """See `method.WholeChunks`."""
        if not all(layout.channels) or any(sizes.refinements):
            return False
        _decode_bases(bases, sizes, layout, parts)
        return True


def _decode_bases(bases: Buffer, sizes: EncodedSizes, layout: ChunkLayout, parts: Sequence[memoryview]) -> None:
    # To the lossless codec, a piece without a refinement is one that is stored as it is.
    refinements = tuple(
        0 if sizes.is_raw(number, size) else -(-size // 512) * 96 for number, size in enumerate(layout.sizes)
    )
    decode_base_into(bases, EncodedSizes(sizes.bases, refinements), layout, parts)


def _layout(shape: Shape) -> ChunkLayout:
    return ChunkLayout(shape.tokens, (Piece("near", shape.heads, shape.head_dim, torch.bfloat16),))


NEAR = Method("near", "1", _encode, _decode, whole=_WholeChunks())
