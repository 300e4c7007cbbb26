"""Makes a model to measure with from a config: nothing is downloaded.

Beside `gpu_check.families`, this is the only file of the bench that knows transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.own_model import own_model, own_prompt
from benchmarks.settings import Settings
from cake_hf.layers.compat import named_for, plain_cache

SEED = 20240


def build_model(settings: Settings) -> Any:
    """Returns the user's model, or a Llama with random weights, the same ones each time, in every process.

    Random weights cost as much time as trained ones and give KV of the same size, and the laws of exactness hold for them
    alike. They have no end-of-text token, so that a generation always has its full length. The weights are made on the device
    in their dtype: no copy of a large model passes through the host.
    """
    if settings.model:
        return own_model(settings)
    shape = settings.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=settings.tokens + 4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    device = torch.device(settings.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        with _default_dtype(getattr(torch, settings.dtype)), device:
            return LlamaForCausalLM(config).eval()


def build_prompt(settings: Settings) -> torch.Tensor:
    """Returns `[1, tokens + suffix_tokens]` token ids on the device, the same each time: random ones, or a text for a user's
    model."""
    if settings.model:
        return own_prompt(settings)
    generator = torch.Generator().manual_seed(SEED)
    length = settings.tokens + settings.suffix_tokens
    ids = torch.randint(0, settings.shape.vocabulary, (1, length), generator=generator)
    return ids.to(settings.device)


def plain_copy(model: Any, cache: Any) -> Any:
    """Returns a `DynamicCache` with its own copy of a cache's KV."""
    copied = plain_cache(model)
    for number, layer in enumerate(cache.layers):
        copied.update(layer.keys.contiguous().clone(), layer.values.contiguous().clone(), number)
    return copied


def cache_of(model: Any, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Returns a `DynamicCache` that starts with these K and V, `[1, heads, tokens, head_dim]`, one pair per layer."""
    return DynamicCache(pairs, config=model.config)


def prefilled(model: Any, ids: torch.Tensor, chunk_size: int) -> Any:
    """A `DynamicCache` with the KV of `[1, tokens]` ids, computed chunk by chunk."""
    cache = plain_cache(model)
    with torch.inference_mode():
        for piece in ids.split(chunk_size, dim=1):
            run_on(model, cache, piece)
    return cache


def run_on(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Run the model on `[1, tokens]` ids behind what the cache holds."""
    model(ids, **named_for(model, cache), logits_to_keep=1)


def transformers_version() -> str:
    """Returns the version of the installed library."""
    return str(transformers.__version__)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
