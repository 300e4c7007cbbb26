"""The layout of a chunk: its tensors, their order and sizes. The same in memory and in the stored file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
import xxhash

from cake_hf.util.forks import cached_property

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in _NAMES.items()}
_PLAIN = json.JSONEncoder(separators=(",", ":"))
_SORTED = json.JSONEncoder(separators=(",", ":"), sort_keys=True)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns safetensors' name of a dtype.

    Raises:
        ValueError: safetensors has no such dtype, or KV is never kept in it.
    """
    if dtype not in _NAMES:
        raise ValueError(f"KV of dtype {dtype} cannot be stored; known are {', '.join(map(str, _NAMES))}.")
    return _NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """Returns the dtype that has this name in safetensors.

    Raises:
        ValueError: KV is never kept in that dtype.
    """
    item_bytes(name)
    return next(dtype for dtype, known in _NAMES.items() if known == name)


def item_bytes(name: object) -> int:
    """Returns the bytes per number of a dtype, given safetensors' name of it.

    Raises:
        ValueError: KV is never kept in that dtype.
    """
    if not isinstance(name, str) or name not in _ITEM_BYTES:
        raise ValueError(f"KV is not kept in {str(name)[:40]!a}.")
    return _ITEM_BYTES[name]


@dataclass(frozen=True)
class Piece:
    """One contiguous tensor of a chunk.

    Attributes:
        name: e.g. "layers.0.keys".
        heads, head_dim: of the KV. The tensor's shape is `[chunk_size, heads, head_dim]`, token-major.
        dtype: the dtype of the KV.
        layer: index of its layer.
        windowed: whether it belongs to a sliding-window layer and is needed only if a window reaches back to the chunk.
    """

    name: str
    heads: int
    head_dim: int
    dtype: torch.dtype
    layer: int = 0
    windowed: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class LayerRange:
    """A part of a chunk that can be read by itself.

    Attributes:
        start, end: the range has the pieces `start` to `end - 1`.
        layers: number of layers that are complete once this range and all ranges before it have been read.
    """

    start: int
    end: int
    layers: int


@dataclass(frozen=True)
class ChunkLayout:
    """All pieces of a chunk, in payload order: keys and values of layer 0, then of layer 1, and so on.

    Sliding-window pieces come after all others, so the needed part of a chunk is always a prefix of its payload.
    """

    chunk_size: int
    pieces: tuple[Piece, ...]

    def of(self, tokens: int) -> ChunkLayout:
        """Returns a layout of the same pieces for another number of tokens."""
        return self if tokens == self.chunk_size else ChunkLayout(tokens, self.pieces)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each piece."""
        return tuple(piece.token_bytes * self.chunk_size for piece in self.pieces)

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Numbers per token of each bfloat16 piece; 0 for pieces of other dtypes, which are never encoded."""
        return tuple(piece.heads * piece.head_dim if piece.dtype is torch.bfloat16 else 0 for piece in self.pieces)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole payload."""
        return sum(self.sizes)

    @cached_property
    def everywhere(self) -> int:
        """Number of pieces that are needed from every chunk; all later pieces are sliding-window pieces."""
        return sum(not piece.windowed for piece in self.pieces)

    @cached_property
    def layers(self) -> int:
        """Number of layers a chunk may have pieces of; they are numbered from 0, and layers that keep nothing have none."""
        return max((piece.layer for piece in self.pieces), default=-1) + 1

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """For each layer, the number of pieces up to its last. Valid without sliding-window pieces, which come out of order."""
        layers = [piece.layer for piece in self.pieces]
        return tuple(sum(other <= layer for other in layers) for layer in range(self.layers))

    def ranges(self, count: int) -> list[LayerRange]:
        """Cuts a chunk between layers into `count` ranges of about equally many layers (fewer ranges if it has fewer
        layers)."""
        if count == 1:
            return [LayerRange(0, len(self.pieces), self.layers)]
        cuts = sorted({self.layers * n // count for n in range(count + 1)})
        edges = [0, *(self.ends[layers - 1] for layers in cuts[1:])]
        return [LayerRange(*pair, layers) for pair, layers in zip(pairwise(edges), cuts[1:], strict=True)]

    @cached_property
    def tensor_table(self) -> dict[str, dict[str, object]]:
        """The safetensors header entries: dtype, shape and data offsets of each piece."""
        table: dict[str, dict[str, object]] = {}
        offset = 0
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            shape = [self.chunk_size, piece.heads, piece.head_dim]
            table[piece.name] = {
                "dtype": dtype_name(piece.dtype),
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            assert math.prod(shape) * piece.dtype.itemsize == size
            offset += size
        return table

    @cached_property
    def name_bytes(self) -> int:
        """Bytes of all pieces' names in JSON, with quotes."""
        return sum(len(name) + 2 for name in self.json_names)

    @cached_property
    def runs(self) -> str:
        """How many pieces in a row have which dtype, heads and head_dim, e.g. "60:BF16:3:64"."""
        alike = groupby((dtype_name(piece.dtype), piece.heads, piece.head_dim) for piece in self.pieces)
        return ",".join([f"{len(list(run))}:{dtype}:{heads}:{dim}" for (dtype, heads, dim), run in alike])

    @cached_property
    def digest(self) -> str:
        """Checksum of the tensor table: of names, order, dtypes and shapes."""
        return xxhash.xxh3_128_hexdigest(self.table_json.encode())

    @cached_property
    def json_names(self) -> tuple[str, ...]:
        """The pieces' names in JSON, without quotes."""
        return tuple(plain_json(piece.name)[1:-1] for piece in self.pieces)

    @cached_property
    def table_json(self) -> str:
        """The tensor table as written in a header."""
        return plain_json(self.tensor_table)

    @cached_property
    def sorted_table_json(self) -> str:
        """The tensor table as covered by a header's seal."""
        return sorted_json(self.tensor_table)


def plain_json(value: object) -> str:
    """Returns JSON without whitespace, in ASCII."""
    return _PLAIN.encode(value)


def sorted_json(value: object) -> str:
    """Returns JSON as `plain_json` does, with sorted keys."""
    return _SORTED.encode(value)
