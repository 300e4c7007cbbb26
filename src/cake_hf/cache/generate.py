"""`generate` as a function: one call instead of a cache and a call."""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.cache.cake_cache import CakeCache
from cake_hf.cache.compat import for_generate, forward_of, has_cache, parameters_of, without_cache
from cake_hf.cache.support import resolve_model
from cake_hf.stores.opening import StoreSpec

_CACHE_OPTIONS = ("chunk_size", "salt", "save", "exact", "strategy", "limits", "snapshot_every")


def generate(
    model: torch.nn.Module, inputs: torch.Tensor | None = None, *, store: StoreSpec | None = None, **kwargs: Any
) -> Any:
    """`model.generate(inputs, **kwargs)` with the prompt's KV restored from, and saved to, a store.

    Serves models whose forward has no `logits_to_keep`, too (a `CakeCache` alone cannot tell their prompts from calls that want
    all logits). Returns once what is new is durable (within `limits.exit_flush_seconds`).

    Args:
        model: a decoder-only transformers model.
        inputs: `[batch, tokens]` token ids; or pass `input_ids=...`.
        store: as for `CakeCache`.
        **kwargs: options of `CakeCache` (chunk_size, salt, save, exact, strategy, limits, snapshot_every) and of
            `model.generate`.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: a cache is given; use a `CakeCache` and `model.generate` for that. Or as `CakeCache` raises.
        CakeError: as `CakeCache` raises.
    """
    if has_cache(kwargs):
        raise ValueError(
            "cake_hf.generate makes its own cache; to pass one, use model.generate(..., cache=CakeCache(...))."
        )
    options = {name: kwargs.pop(name) for name in _CACHE_OPTIONS if name in kwargs}
    with CakeCache(model, store, **options) as cache:
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and _needs_prefill(model) and _is_plain(kwargs.get("attention_mask")):
            cache.prefill(ids)
        plain: Any = model.generate
        return plain(inputs, **for_generate(model, cache), **without_cache(kwargs))


def _needs_prefill(model: torch.nn.Module) -> bool:
    """Whether the hook cannot tell a prompt by `logits_to_keep`, but `generate` can go on from what `prefill` brings.

    For that `generate` has to make an attention mask: by its length it tells how much of the prompt is new.
    """
    parameters = parameters_of(forward_of(resolve_model(model)))
    return "logits_to_keep" not in parameters and "attention_mask" in parameters


def _is_plain(mask: torch.Tensor | None) -> bool:
    return mask is None or bool((mask == 1).all())
