"""Finds the transformers model in the object that the caller passed as the model."""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.errors import UnsupportedModel
from cake_hf.layers.compat import cache_name, forward_of, is_from_transformers


def resolve_model(model: Any, store: Any = None) -> torch.nn.Module:
    """Returns the transformers model itself, unwrapped from PEFT, torch.compile, DataParallel, or a module around it.

    Args:
        model: the object passed as the model.
        store: the object passed as the store, to detect that the two were swapped.

    Raises:
        TypeError: `model` is not a model at all.
        UnsupportedModel: it contains no transformers model, or more than one.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(_what_it_is_instead(model, store))
    unwrap = getattr(model, "get_base_model", None)
    if unwrap is not None:
        return resolve_model(unwrap())
    if len(getattr(model, "device_ids", None) or ()) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} copies the model to several devices; use a CakeCache for the model in it (.module)."
        )
    within: torch.nn.Module = getattr(model, "_orig_mod", model)  # torch.compile
    if is_from_transformers(within) or (hasattr(within, "config") and cache_name(forward_of(within))):
        return within
    return _only_one_in(within)


def _only_one_in(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the only transformers model in a module; the module itself if it contains none, and has a config."""
    within: set[torch.nn.Module] = set()
    found: list[torch.nn.Module] = []
    for part in module.modules():  # outer ones first
        if is_from_transformers(part) and part not in within:
            found.append(part)
            within.update(part.modules())
    if len(found) == 1:
        return found[0]
    if not found and hasattr(module, "config"):
        return module
    raise UnsupportedModel(
        f"{type(module).__name__} is no transformers model, and there are {len(found)} in it; "
        "make the CakeCache with the one that generates."
    )


def _what_it_is_instead(model: Any, store: Any) -> str:
    if isinstance(store, torch.nn.Module):
        return "The arguments are swapped: the model comes first, then the store, as in CakeCache(model, store)."
    if isinstance(model, str):
        return f"A model is needed, not its name {model!r}; load it with AutoModelForCausalLM.from_pretrained."
    kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    return f"A transformers model is needed as the first argument, not {kind}; load it with from_pretrained."
