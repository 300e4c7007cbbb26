"""Attention as a press computes it where it needs the weights, or keys that differ from one query head to the next."""

from __future__ import annotations

import torch


def grouped(query: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns queries `[1, heads, group, new, head_dim]`: by the key head that they use."""
    by_head: torch.Tensor = query.unflatten(1, (heads, -1))
    return by_head


def attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output `[1, new, query heads, head_dim]`, and the weights `[1, heads, group, new, kept]` in float32.

    Args:
        query: as `grouped` returns it.
        keys, values: `[1, heads, 1 or group, kept, head_dim]`.
        scaling: what the products are multiplied by.
        mask: additive, `[1, 1, new, kept]`, or None.
    """
    return weighed(query @ keys.transpose(-1, -2) * scaling, values, mask)


def weighed(scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `attended` returns, from scaled products `[1, heads, group, new, kept]`."""
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    output = weights.to(values.dtype) @ values
    return output.flatten(1, 2).transpose(1, 2).contiguous(), weights
