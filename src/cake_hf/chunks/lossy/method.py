"""What a lossy method is: two functions between numbers and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import Buffer, Encoded, EncodedSizes

if TYPE_CHECKING:
    from numpy.typing import NDArray  # brings much that nothing else needs

    Numbers = NDArray[np.float32]
    """`[tokens, heads, head_dim]`, finite, in memory order."""

    Bytes = NDArray[np.uint8]


class Role(NamedTuple):
    """What a piece is in its model.

    Attributes:
        values: it has the values of a layer; otherwise keys, or what an indexer keeps.
        depth: its layer over the number of layers, from 0 up to but not including 1.
    """

    values: bool
    depth: float = 0.0


class Shape(NamedTuple):
    """The shape of a piece."""

    tokens: int
    heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        """Numbers per token."""
        return self.heads * self.head_dim


class WholeChunks(Protocol):
    """Encodes and decodes whole chunks, with the same result as piece by piece."""

    def encode(self, payload: memoryview, layout: ChunkLayout) -> Encoded | None:
        """See `coding.code_chunk`; returns None, and does nothing, if the pieces of such a chunk must be encoded one by one."""

    def decode(
        self, bases: Buffer, refinements: Buffer, sizes: EncodedSizes, layout: ChunkLayout, parts: Sequence[memoryview]
    ) -> bool:
        """See `coding.decode_chunk`; returns False, and does nothing, if the pieces must be decoded one by one."""


@dataclass(frozen=True)
class Method:
    """A lossy codec. Both functions are deterministic, and neither depends on threads or on the processor.

    Attributes:
        name: as users write it, and as the header of a chunk has it.
        version: in the header of a chunk; raised whenever the same bytes would decode to other numbers.
        encode: returns base and refinement of a piece; the refinement is empty unless the codec has layers.
        decode: returns the numbers, from base and refinement; raises CorruptChunk if they are not as the encoder makes them.
        decode_base: returns the coarser numbers that the base alone gives; None if the codec has no layers.
        whole: encodes and decodes whole chunks; None if their pieces are encoded and decoded one by one.
        library: that has to be installed, by the name of its module; empty for none.
        rounding: a part of keys; raised whenever the same numbers would become other ones in the cache.
    """

    name: str
    version: str
    encode: Callable[[Numbers, Role], tuple[Bytes, Bytes]]
    decode: Callable[[Bytes, Bytes, Shape, Role], Numbers]
    decode_base: Callable[[Bytes, Shape, Role], Numbers] | None = None
    whole: WholeChunks | None = None
    library: str = ""
    rounding: str = "1"
