"""Restoring prompts in transformers' continuous batching: many requests at once, with steps and loads shared among them."""

from __future__ import annotations

from cake_hf.serving.entry import batching, generate_batch

__all__ = ["batching", "generate_batch"]
