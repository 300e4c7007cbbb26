"""The oracle of cuts: a `DynamicCache` that was prefilled in the same pieces, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache

from family_runs import Run, generate
from models import CHUNK
from naming import given


def in_pieces(model: Any, ids: torch.Tensor, cuts: Sequence[int], **options: Any) -> Run:
    """Chunks from each cut on, then what is left up to the next one; the prompt's last piece is run by `generate`."""
    used = DynamicCache(config=model.config)
    for start, end in pieces(ids.shape[1], cuts)[:-1]:
        run_piece(model, ids, used, start, end)
    return generate(model, used, ids, **options)


def run_piece(model: Any, ids: torch.Tensor, used: Any, start: int, end: int) -> None:
    """One forward."""
    with torch.no_grad():
        model(ids[:, start:end], attention_mask=torch.ones_like(ids[:, :end]), **given(used), use_cache=True)


def pieces(tokens: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Of a prompt."""
    found = []
    for first, last in pairwise([0, *(cut for cut in cuts if cut < tokens), tokens]):
        found += [(start, min(start + CHUNK, last)) for start in range(first, last, CHUNK)]
    return found
