"""What the tests of presses need: a document on a cache, a model whose attention prefers some tokens, and logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import DynamicCache

from cake_hf.presses import PressedCache, PressReport
from models import CHUNK, build, prompt
from naming import given

QUESTION = 9


@cache
def sharp(family: str = "llama", dtype: str = "float32", attention: str = "sdpa") -> Any:
    """A small model with sharper attention: with random weights, every token gets about as much as any other."""
    model: Any = build(family, dtype, attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "query_key_value" in name:
                weight.mul_(30)
    return model


def document(model: Any, ids: torch.Tensor) -> DynamicCache:
    """The document on a `DynamicCache`, in chunks."""
    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        for start in range(0, ids.shape[1], CHUNK):
            end = start + CHUNK
            model(ids[:, start:end], attention_mask=torch.ones_like(ids[:, :end]), **given(kept))
    return kept


def asked(ids: torch.Tensor, question: int = QUESTION) -> torch.Tensor:
    """A document with a question behind it."""
    return torch.cat([ids, prompt(question, seed=5)], dim=1)


def logits_of(model: Any, kept: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of what is new of `ids`, in one forward."""
    with torch.no_grad():
        logits: torch.Tensor = model(
            ids[:, kept.get_seq_length() :], attention_mask=torch.ones_like(ids), **given(kept)
        ).logits
    return logits


def one_by_one(model: Any, kept: Any, ids: torch.Tensor) -> torch.Tensor:
    """The same, a token a forward."""
    ends = range(kept.get_seq_length() + 1, ids.shape[1] + 1)
    return torch.cat([logits_of(model, kept, ids[:, :end]) for end in ends], dim=1)


def report_of(small: PressedCache) -> PressReport:
    assert small.report is not None
    return small.report
