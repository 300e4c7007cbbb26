"""Converts token ids from the forms that callers have them in to one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def token_ids(given: Any) -> torch.Tensor:
    """Returns the token ids as a tensor `[rows, tokens]`, int64.

    Args:
        given: a tensor, an array or a list of numbers, of one row or several; or what a tokenizer returns.

    Raises:
        TypeError: it is something else.
        ValueError: it does not have that form, or its numbers are not token ids.
    """
    if isinstance(given, Mapping):  # a BatchEncoding, too
        return _of_mapping(given)
    if given is None or isinstance(given, (str, bytes)) or not hasattr(given, "__len__"):
        raise TypeError(
            f"Token ids are a tensor, an array or a list of numbers, not {_kind(given)}; use the tokenizer."
        )
    ids = given if isinstance(given, torch.Tensor) else _as_tensor(given)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"Token ids are [rows, tokens], or the tokens of one row; these are {list(ids.shape)}.")
    if ids.numel() and ids.dtype not in _WHOLE:
        raise ValueError(f"Token ids are whole numbers, not {ids.dtype}; use what the tokenizer gives.")
    return ids.to(torch.int64)


def _of_mapping(given: Mapping[str, Any]) -> torch.Tensor:
    if "input_ids" not in given:
        raise ValueError("There are no 'input_ids' in what was given as token ids; use what the tokenizer gives.")
    ids, mask = token_ids(given["input_ids"]), given.get("attention_mask")
    if mask is not None and not bool((token_ids(mask) == 1).all()):
        raise ValueError(
            "The token ids have padding; give one prompt without padding, or call generate with the batch."
        )
    return ids


def _as_tensor(given: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Token ids are numbers, in rows of equal length: {error}.") from None


def _kind(given: Any) -> str:
    return "None" if given is None else type(given).__name__
