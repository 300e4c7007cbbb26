"""What the installed transformers calls the cache: tests write `**given(cache)` and run on every version."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from cake_hf.layers.compat import generate_name

NAME = generate_name()


def given(cache: Any) -> dict[str, Any]:
    """The cache as a named argument of `generate`, or of a forward of one of transformers' own models."""
    return {NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache in what a forward, or `generate`, gives back."""
    return getattr(output, NAME)


def mask_sizes(layer: Any, queries: int) -> tuple[int, int]:
    """What a layer says about the mask for so many new tokens; older versions ask by their positions."""
    takes = next(iter(inspect.signature(layer.get_mask_sizes).parameters))
    sizes: tuple[int, int] = layer.get_mask_sizes(torch.arange(queries) if takes == "cache_position" else queries)
    return sizes


def in_this_version(text: str) -> str:
    """A snippet as people with the installed version of transformers have to write it."""
    return re.sub(r"\bcache=(?=cache\b|copy\b|small\b|hurried\b|DynamicCache\b)", f"{NAME}=", text)
