"""Chunks of KV of a model, made from texts, or kept from an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import prefilled
from cake_hf.chunks.aligned_memory import host_bytes
from cake_hf.chunks.layout import ChunkLayout, Piece


@dataclass(frozen=True)
class RealKv:
    """The KV of one text.

    Attributes:
        name: of the text.
        pieces: K and V of each layer in turn, `[tokens, heads, head_dim]`.
    """

    name: str
    pieces: Sequence[torch.Tensor]

    @property
    def tokens(self) -> int:
        """Of the text."""
        return self.pieces[0].shape[0]

    def layout(self, chunk_size: int) -> ChunkLayout:
        """Of a chunk."""
        kinds = ("keys", "values")
        pieces = [
            Piece(f"layers.{n // 2}.{kinds[n % 2]}", tensor.shape[1], tensor.shape[2], tensor.dtype, n // 2)
            for n, tensor in enumerate(self.pieces)
        ]
        return ChunkLayout(chunk_size, tuple(pieces))

    def payloads(self, chunk_size: int) -> list[bytes]:
        """Of the text's full chunks."""
        return [
            b"".join(host_bytes(tensor[start : start + chunk_size]) for tensor in self.pieces)
            for start in range(0, self.tokens - chunk_size + 1, chunk_size)
        ]


def real_kv(model: Any, tokenizer: Any, name: str, text: str, tokens: int, chunk_size: int) -> RealKv:
    """The KV of a text's first tokens.

    Raises:
        ValueError: the text is too short, or the model keeps no plain KV of all tokens in each layer.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"{name} has only {ids.shape[1]} tokens; choose fewer --tokens.")
    cache = prefilled(model, ids.to(model.device), chunk_size)
    pieces = [
        tensor[0].transpose(0, 1).contiguous().cpu() for tensor in chain(*((x.keys, x.values) for x in cache.layers))
    ]
    if any(piece.shape[0] != tokens for piece in pieces):
        raise ValueError("This model does not keep the KV of all tokens in each layer.")
    return RealKv(name, pieces)


def keep(kv: RealKv, folder: Path) -> None:
    """Write it to a file for `kept`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"name": kv.name, "pieces": list(kv.pieces)}, folder / f"{kv.name}.pt")


def kept(folder: Path) -> list[RealKv]:
    """All KV that was kept in a folder."""
    found = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
    return [RealKv(one["name"], one["pieces"]) for one in found]
