"""`generate` as a function: a single call that makes its own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from cake_hf.blocks import checked_cuts
from cake_hf.cache.cake_cache import CakeCache
from cake_hf.cache.token_ids import token_ids
from cake_hf.errors import UnsupportedModel
from cake_hf.layers.compat import for_generate, forward_parameters, has_cache, without_cache
from cake_hf.model.which_model import resolve_model
from cake_hf.report import Report
from cake_hf.stores.opening import StoreSpec

_CACHE_OPTIONS = ("chunk_size", "salt", "save", "exact", "strategy", "limits", "snapshot_every", "codec", "max_ttft")


def generate(
    model: torch.nn.Module,
    inputs: Any = None,
    *,
    store: StoreSpec | None = None,
    report: Callable[[Report], object] | None = None,
    boundaries: Iterable[int] = (),
    **kwargs: Any,
) -> Any:
    """Runs `model.generate(inputs, **kwargs)` with the prompt's KV restored from, and saved to, a store.

    Also serves models whose forward has no `logits_to_keep` (a `CakeCache` alone cannot tell their prompts from calls that want
    all logits), and those whose config says `use_cache=False`. Returns once new chunks are durable (within
    `limits.exit_flush_seconds`).

    Args:
        model: a decoder-only transformers model.
        inputs: `[batch, tokens]` token ids, or the tokenizer's output; or pass `input_ids=...`.
        store: as for `CakeCache`.
        report: called with the prompt's report at the end, e.g. `print`, or the `append` of a list.
        boundaries: cuts, as numbers of tokens from the prompt's start: the ends of parts that other prompts share, such as a
            document. Up to a cut, the prompt is run, stored and restored by itself (see `CakeCache.prefill`).
        **kwargs: options of `CakeCache` (chunk_size, salt, save, exact, strategy, limits, snapshot_every, codec,
            max_ttft) and of `model.generate`.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: a cache, or a kind of cache, is passed (use a `CakeCache` and `model.generate` for that); a boundary is
            outside the prompt; or as raised by `CakeCache`.
        CakeError: as raised by `CakeCache`.
        UnsupportedModel: the model has no `generate`.
        TypeError: the arguments are not a model and token ids, a boundary is not a whole number, or `report` is not callable.
    """
    if report is not None and not callable(report):
        raise TypeError(f"report is called with the prompt's report, as in report=print; {report!r} cannot be called.")
    if has_cache(kwargs):
        raise ValueError(
            "cake_hf.generate makes its own cache; to pass one, use model.generate(..., cache=CakeCache(...))."
        )
    within = resolve_model(model, store)
    plain = _generate_of(within, model)
    options = {name: kwargs.pop(name) for name in _CACHE_OPTIONS if name in kwargs}
    if isinstance(inputs, Mapping):
        inputs, kwargs = None, {**inputs, **kwargs}
    inputs = _as_tensor(inputs)
    kwargs.update({name: _as_tensor(kwargs[name]) for name in ("input_ids", "attention_mask") if name in kwargs})
    kwargs = _with_use_cache(within, kwargs)
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    cuts = checked_cuts(boundaries, ids.shape[-1] if isinstance(ids, torch.Tensor) else 0)
    with CakeCache(model, store, **options) as cache:
        cache._cuts = cuts
        if isinstance(ids, torch.Tensor) and _needs_prefill(within) and _is_plain(kwargs.get("attention_mask")):
            cache._bring(ids, cuts, whole=False, ends=False)
        answer = plain(inputs, **for_generate(within, cache), **without_cache(kwargs))
    if report is not None:
        report(cache.report)
    return answer


def _as_tensor(numbers: Any) -> Any:
    """Converts token ids to a tensor. Tensors, which `generate` checks itself, and None are returned unchanged."""
    return numbers if numbers is None or isinstance(numbers, torch.Tensor) else token_ids(numbers)


def _generate_of(within: torch.nn.Module, model: Any) -> Any:
    """Returns the `generate` to call: the wrapper's own, if it has one.

    Raises:
        UnsupportedModel: there is none, or only that of a model whose wrapper may change what it computes.
    """
    if hasattr(model, "generate"):
        return model.generate
    if hasattr(within, "generate") and getattr(model, "module", None) is within:  # DataParallel and similar wrappers
        return within.generate
    raise UnsupportedModel(
        f"{type(model).__name__} has no generate; pass a model that has, or use a CakeCache with its prefill."
    )


def _with_use_cache(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `generate`, changed so that a cache that is passed is used.

    Raises:
        ValueError: a kind of cache is chosen, which transformers does not accept together with a cache.
    """
    config = arguments.get("generation_config") or getattr(model, "generation_config", None)

    def chosen(name: str) -> Any:
        return arguments[name] if name in arguments else getattr(config, name, None)

    if (kind := chosen("cache_implementation")) not in (None, "hybrid"):  # transformers treats that one as the default
        raise ValueError(
            f"cake_hf.generate makes its own cache, and cache_implementation={kind!r} asks for another; set it to None, in "
            "model.generation_config if it is from there."
        )
    return {**arguments, "use_cache": True} if chosen("use_cache") is False else arguments


def _needs_prefill(model: torch.nn.Module) -> bool:
    """Returns whether the hook cannot recognize a prompt by `logits_to_keep`, but `generate` can continue after `prefill`.

    To continue, `generate` has to make an attention mask: it derives from the mask's length how much of the prompt is new.
    """
    parameters = forward_parameters(model)
    return "logits_to_keep" not in parameters and "attention_mask" in parameters


def _is_plain(mask: torch.Tensor | None) -> bool:
    return mask is None or bool((mask == 1).all())
