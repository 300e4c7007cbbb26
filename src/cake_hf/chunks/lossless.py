"""The lossless codec: a bfloat16 piece as an 8-bit base and a 3-bit refinement per number, 0.70 of its bytes on real KV.

The base of a number has its sign, the place of its exponent in its channel's window of seven exponents (or that it is not in
there), and the upper four bits of its mantissa. The refinement has the lower three bits. All bases of a chunk lie together, and
so do all refinements: who reads the bases alone gets a defined rounding (`decode_base_into`). A piece that would not shrink, or
is of another dtype, is its own base and has no refinement.

docs/format.md describes the bytes. `lossless.c` and `lossless_numpy.py` make and read the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless_numpy import NumpyCodec
from cake_hf.chunks.native import NativeCodec, library
from cake_hf.errors import CorruptChunk
from cake_hf.util.forks import cached_property

if TYPE_CHECKING:
    from numpy.typing import NDArray  # brings much that nothing else needs

CODEC, CODEC_VERSION = "lossless", "1"
"""As written in a chunk's metadata."""

Buffer = bytes | bytearray | memoryview
Codec = NativeCodec | NumpyCodec


@dataclass(frozen=True)
class EncodedSizes:
    """Bytes of each piece's base and refinement. A base as large as the piece, without refinement, is the piece itself."""

    bases: tuple[int, ...]
    refinements: tuple[int, ...]

    @cached_property
    def base_bytes(self) -> int:
        """Bytes of all bases."""
        return sum(self.bases)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole encoded payload."""
        return self.base_bytes + sum(self.refinements)

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """`[pieces, 2]`."""
        return np.array([self.bases, self.refinements], np.int64).T.copy()

    def is_raw(self, number: int, size: int) -> bool:
        """Returns whether piece `number`, which has `size` bytes as it is, is stored as it is."""
        return not self.refinements[number] and self.bases[number] == size

    def check(self, layout: ChunkLayout, *, lossy: bool = False) -> None:
        """Refuses sizes that the encoder never gives for pieces of that layout.

        Args:
            layout: of the chunk.
            lossy: the codec is lossy: it encodes other dtypes, too, and there may be no refinement.

        Raises:
            CorruptChunk: these are such.
        """
        if not len(self.bases) == len(self.refinements) == len(layout.pieces):
            raise CorruptChunk("An encoded chunk holds another number of pieces than the model's KV.")
        pairs = zip(self.bases, self.refinements, strict=True)
        for size, channels, (base, refinement) in zip(layout.sizes, layout.channels, pairs, strict=True):
            allowed = lossy or (channels and refinement > 0)
            encoded = allowed and base > 0 and refinement >= 0 and base + refinement < size
            if (base, refinement) != (size, 0) and not encoded:
                raise CorruptChunk(f"A piece of {size} bytes cannot be encoded in {base} and {refinement}.")


@dataclass(frozen=True)
class Encoded:
    """An encoded chunk.

    Attributes:
        bases: of all pieces, back to back.
        refinements: likewise.
        sizes: of both.
    """

    bases: memoryview
    refinements: memoryview
    sizes: EncodedSizes


@cache
def default_codec() -> Codec:
    """Returns the codec in C, or in numpy if the library was not built."""
    loaded = library()
    return NumpyCodec() if loaded is None else NativeCodec(loaded)


def is_native() -> bool:
    """Returns whether the codec in C is in use."""
    return isinstance(default_codec(), NativeCodec)


def encode(payload: Buffer, layout: ChunkLayout, codec: Codec | None = None) -> Encoded:
    """Encodes a chunk. Other threads run meanwhile if the codec is native.

    Args:
        payload: the layout's pieces, back to back.
        layout: of the chunk.
        codec: the default one if None.
    """
    array = np.frombuffer(payload, np.uint8)
    if array.nbytes != layout.nbytes:
        raise ValueError(f"{array.nbytes} bytes are not the {layout.nbytes} of the layout.")
    if not layout.pieces:
        return Encoded(memoryview(b""), memoryview(b""), EncodedSizes((), ()))
    bases, refinements, sizes = (codec or default_codec()).encode(array, layout.sizes, layout.channels)
    return Encoded(bases.data, refinements.data, EncodedSizes(*map(tuple, sizes.T.tolist())))


def decode_into(
    bases: Buffer,
    refinements: Buffer,
    sizes: EncodedSizes,
    layout: ChunkLayout,
    parts: Sequence[memoryview],
    first: int = 0,
    codec: Codec | None = None,
) -> None:
    """Decodes consecutive pieces of a chunk into writable buffers. Other threads run meanwhile if the codec is native.

    Args:
        bases: of these pieces, back to back.
        refinements: likewise.
        sizes: of the whole chunk; see `EncodedSizes.check`.
        layout: of the chunk.
        parts: where the pieces go.
        first: number of the first of these pieces in the chunk.
        codec: the default one if None.

    Raises:
        CorruptChunk: the bytes are not as the encoder makes them. The parts are then undefined; nothing else was written to.
    """
    _decode(bases, refinements, sizes, layout, parts, first, codec)


def decode_base_into(
    bases: Buffer,
    sizes: EncodedSizes,
    layout: ChunkLayout,
    parts: Sequence[memoryview],
    first: int = 0,
    codec: Codec | None = None,
) -> None:
    """Decodes like `decode_into`, from the bases alone: each number of an encoded piece becomes that of `rounded`."""
    _decode(bases, None, sizes, layout, parts, first, codec)


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    """Returns bfloat16 numbers as their bases say them: the middle of all numbers with that base.

    The three lowest bits of the mantissa become 4, or 0 in zeros, subnormal numbers, infinities and NaN. So a NaN that has no
    other bits than these three becomes an infinity. Rounding twice changes nothing more.
    """
    bits = numbers.view(torch.int16)
    exponents = bits >> 7 & 255
    usual = (exponents != 0) & (exponents != 255)
    return (bits & ~7 | usual.to(torch.int16) << 2).view(torch.bfloat16)


def refine(numbers: torch.Tensor, refinement: torch.Tensor) -> None:
    """Puts the refinement of a piece into the bfloat16 numbers that its base gave, on any device: they become exact.

    Args:
        numbers: contiguous, in the order in which they were encoded; changed in place.
        refinement: `[bytes]` uint8 of that piece, checked.
    """
    packed = refinement.view(-1, 3, 32)
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8).view(1, 8, 1)
    lower = packed[:, :2].repeat_interleave(4, dim=1) >> 2 * (shifts & 3) & 3
    upper = packed[:, 2:] >> shifts & 1
    bits = numbers.view(torch.int16).view(-1)
    bits &= ~7
    bits |= (lower | upper << 2).view(-1)[: bits.numel()]


def _decode(
    bases: Buffer,
    refinements: Buffer | None,
    sizes: EncodedSizes,
    layout: ChunkLayout,
    parts: Sequence[memoryview],
    first: int,
    codec: Codec | None,
) -> None:
    if not parts:
        return
    wanted = slice(first, first + len(parts))
    if tuple([part.nbytes for part in parts]) != layout.sizes[wanted] or len(sizes.bases) != len(layout.pieces):
        raise ValueError("These are not the sizes and places of that layout's pieces.")
    table, arrays = sizes.table[wanted], [np.frombuffer(bases, np.uint8)]
    if refinements is not None:
        arrays.append(np.frombuffer(refinements, np.uint8))
    if (table < 0).any() or any(array.nbytes != size for array, size in zip(arrays, table.sum(0), strict=False)):
        raise CorruptChunk("An encoded chunk is not as long as its metadata says.")
    channels = np.where(table[:, 1] > 0, layout.channels[wanted], 0)
    (codec or default_codec()).decode(arrays[0], arrays[1] if refinements is not None else None, table, channels, parts)
