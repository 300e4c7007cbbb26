"""The reference for caches with a lossy codec: chunks on a `DynamicCache`, each coded by hand before the next one runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossy import LOSSY, code_chunk, lossy_method
from models import CHUNK
from naming import given

NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "cachegen" and not find_spec("constriction"), reason="no library")
    )
    for name in LOSSY
]
"""All lossy codecs, as parameters; those whose library is missing are skipped."""


def prefilled(model: Any, ids: torch.Tensor, codec: str, cuts: tuple[int, ...] = ()) -> DynamicCache:
    """A cache with the prompt's chunks, but for its last piece of one token up to a chunk.

    Args:
        model: any whose layers keep all tokens, a window, or states.
        ids: `[1, tokens]` of the prompt.
        codec: a lossy one; "none" for the exact reference.
        cuts: places at which chunks start anew; a piece before one that fills no chunk is a tail, and stays exact.
    """
    cache = DynamicCache(config=model.config)
    start, total = 0, ids.shape[1]
    with torch.no_grad():
        for cut in (*cuts, total):
            while start < cut - (cut == total) and (cut < total or start + CHUNK < cut):
                end = min(start + CHUNK, cut)
                mask = torch.ones_like(ids[:, :end])
                model(ids[:, start:end], attention_mask=mask, **given(cache), logits_to_keep=1)
                if codec != "none" and start and end - start == CHUNK:
                    code(cache, start, end, codec)
                start = end
    return cache


def code(cache: DynamicCache, start: int, end: int, codec: str) -> None:
    """Puts tokens `start` to `end - 1` of the layers that keep each token through a codec."""
    kept = [
        (number, name, getattr(layer, name))
        for number, layer in enumerate(cache.layers)
        if not getattr(layer, "is_sliding", False) and getattr(layer, "keys", None) is not None
        for name in ("keys", "values")
    ]
    if not kept:
        return
    chunks = [states[:, :, start:end].transpose(1, 2)[0].contiguous() for _, _, states in kept]
    pieces = [
        Piece(f"layers.{number}.{name}", chunk.shape[1], chunk.shape[2], chunk.dtype, number)
        for (number, name, _), chunk in zip(kept, chunks, strict=True)
    ]
    payload = memoryview(bytearray(b"".join(chunk.view(torch.uint8).numpy().tobytes() for chunk in chunks)))
    layout = ChunkLayout(end - start, tuple(pieces))
    code_chunk(payload, layout, lossy_method(codec))
    flat, at = torch.frombuffer(payload, dtype=torch.uint8), 0
    for (_, _, states), chunk, size in zip(kept, chunks, layout.sizes, strict=True):
        states[:, :, start:end] = flat[at : at + size].view(chunk.dtype).view(chunk.shape).transpose(0, 1)
        at += size
