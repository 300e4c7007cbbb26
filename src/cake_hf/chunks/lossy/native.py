"""The lossy codecs in C (`lossy.c`): a chunk in one call, with the same bytes as `coding` makes of each piece with numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import Buffer, Encoded, EncodedSizes
from cake_hf.chunks.lossy.coding import is_coded, is_values
from cake_hf.chunks.native import AUTOMATIC, Library, addresses, library, refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUPED, LAYERED, ROTATED = 0, 1, 2
"""Kinds of codes: those of `integers`, `quantspec` and `rotation`."""

_DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_SHAPE = 5
"""Numbers that describe a piece to the library, at the start of its row."""


@dataclass(frozen=True)
class Kernels:
    """A method as the library knows it.

    Attributes:
        kind: the kind of codes.
        bits: of a code; of each of the two if LAYERED.
        size: of a group, as for `Groups`.
        signs: 32 bytes, if ROTATED.
        variant: the variant of the kernels.
        load: returns the library, or None.
    """

    kind: int
    bits: int
    size: int = 0
    signs: bytes = b""
    variant: int = AUTOMATIC
    load: Callable[[], Library | None] = library

    def encode(self, payload: memoryview, layout: ChunkLayout) -> Encoded | None:
        """See `WholeChunks`; None if the library was not built. Other threads run meanwhile."""
        loaded = self.load()
        if loaded is None or not layout.pieces:
            return None
        numbers = np.frombuffer(payload, np.uint8)
        bases = np.empty(numbers.nbytes, np.uint8)
        refinements = np.empty(numbers.nbytes // 2 if self.kind == LAYERED else 0, np.uint8)
        rows = np.zeros((len(layout.pieces), _SHAPE + 3), np.int64)
        rows[:, :_SHAPE] = _shapes(layout, [is_coded(piece) for piece in layout.pieces])
        sizes = rows[:, _SHAPE - 1]
        rows[:, _SHAPE] = numbers.ctypes.data + sizes.cumsum() - sizes
        outputs = (bases.ctypes.data, bases.nbytes, refinements.ctypes.data, refinements.nbytes)
        refuse(loaded.cake_lossy_encode(*self._scheme(layout), len(rows), rows.ctypes.data, *outputs))
        found = EncodedSizes(*map(tuple, rows[:, -2:].T.tolist()))
        return Encoded(bases[: found.base_bytes].data, refinements[: sum(found.refinements)].data, found)

    def decode(
        self,
        bases: Buffer,
        refinements: Buffer,
        sizes: EncodedSizes,
        layout: ChunkLayout,
        parts: Sequence[memoryview],
    ) -> bool:
        """See `WholeChunks`; False if the library was not built. Other threads run meanwhile."""
        loaded, count = self.load(), len(parts)
        if loaded is None or not count:
            return False
        encoded = [not sizes.is_raw(number, part.nbytes) for number, part in enumerate(parts)]
        rows, table = np.empty((count, _SHAPE + 5), np.int64), sizes.table[:count]
        starts = table.cumsum(0) - table
        rows[:, :_SHAPE] = _shapes(layout, encoded)
        rows[:, _SHAPE] = addresses(parts)
        for column, buffer in enumerate((bases, refinements)):
            rows[:, _SHAPE + 1 + 2 * column] = np.frombuffer(buffer, np.uint8).ctypes.data + starts[:, column]
            rows[:, _SHAPE + 2 + 2 * column] = table[:, column]
        refuse(loaded.cake_lossy_decode(*self._scheme(layout), count, rows.ctypes.data))
        return True

    def _scheme(self, layout: ChunkLayout) -> tuple[int, int, int, int, bytes, int]:
        return self.variant, self.kind, self.bits, self.size, self.signs, layout.chunk_size


def _shapes(layout: ChunkLayout, coded: Sequence[bool]) -> NDArray[np.int64]:
    """Returns `[pieces, 5]` of the first pieces: dtype (0 if a piece is not coded), role, heads, head_dim, bytes."""
    described = zip(layout.pieces, layout.sizes, coded, strict=False)
    return np.array(
        [
            (_DTYPES.get(piece.dtype, 0) * yes, is_values(piece), piece.heads, piece.head_dim, size)
            for piece, size, yes in described
        ],
        np.int64,
    )
