"""KVMerger: Model Tells You Where to Merge (Wang et al., 2024, arXiv 2407.08454)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, Press, check_share


@dataclass(frozen=True)
class KVMerger(Press):
    """Merges neighbouring entries whose keys are alike.

    A merging set is a run of consecutive tokens of which each key is similar (cosine) to the one before (section 4.1); the
    similarity that is asked for follows from the budget, so each head keeps exactly as many entries. The entry with the most
    attention is a set's pivot p, and the others count by a Gaussian kernel (section 4.2): `g_i = exp(-||k_p - k_i||^2 / 2s^2)`,
    with s^2 half of the mean squared distance in the set. The merged key and value are the means with weights `g_i / sum(g)`.
    Entries with the most attention, and the last ones, stay alone. (The paper sums attention over all queries of the prompt. A
    restore has only keys and values, so here it is that of the last queries.) Memory: a share `keep` of the KV.

    Args:
        keep: share of the entries that are left. With 1 the output is bit for bit that of the full cache.
        heavy: share of the entries that stay alone for the attention they have; fewer if the budget does not allow as many.
        window: queries that are asked, and recent entries that stay alone.
    """

    keep: float = 0.5
    heavy: float = 0.1
    window: int = 32
    needs_queries = True

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_share("heavy", self.heavy)

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        keys, values = prefix.keys[number], prefix.values[number]
        old = prefix.tokens - min(self.window, prefix.tokens)
        merges = min(prefix.tokens - round(self.keep * prefix.tokens), old - 1)
        if merges <= 0:
            return prefix.plain_layer(number)
        attention = prefix.window[number].by_head(keys)
        alone = min(int(self.heavy * prefix.tokens), (old - 1 - merges) // 2)  # each keeps two pairs apart
        sets = _sets(keys[0], attention, old, merges, alone)
        key, value = _merged(keys[0].float(), values[0].float(), attention, sets, prefix.tokens - merges)
        return PressedLayer(key[None].to(keys.dtype), value[None].to(values.dtype), prefix.tokens)


def _sets(keys: torch.Tensor, attention: torch.Tensor, old: int, merges: int, alone: int) -> torch.Tensor:
    """Returns for each entry `[heads, tokens]` the number of its merging set, in the order of the tokens."""
    similarity = torch.cosine_similarity(
        keys[:, 1:].float(), keys[:, :-1].float(), dim=-1
    )  # of tokens 1.. to the one before
    similarity[:, old - 1 :] = float("-inf")
    heavy = attention[:, :old].topk(alone, dim=-1).indices
    apart = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, heavy, value=True)
    similarity = similarity.masked_fill(apart[:, 1:] | apart[:, :-1], float("-inf"))
    joined = torch.zeros_like(apart).scatter_(1, similarity.topk(merges, dim=-1).indices + 1, value=True)
    return (~joined).long().cumsum(dim=-1) - 1


def _merged(
    keys: torch.Tensor, values: torch.Tensor, attention: torch.Tensor, sets: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values `[heads, count, head_dim]` of merging sets."""

    def summed(states: torch.Tensor) -> torch.Tensor:
        index = sets[..., None].expand_as(states)
        return torch.zeros(*sets.shape[:1], count, states.shape[-1], device=keys.device).scatter_add_(1, index, states)

    def of_set(states: torch.Tensor) -> torch.Tensor:
        return states.gather(1, sets[..., None].expand(-1, -1, states.shape[-1]))

    most = torch.zeros(sets.shape[0], count, device=keys.device).scatter_reduce_(1, sets, attention, "amax")
    candidates = torch.where(attention == most.gather(1, sets), torch.arange(sets.shape[1], device=keys.device), -1)
    pivots = torch.full_like(most, -1, dtype=torch.long).scatter_reduce_(1, sets, candidates, "amax")
    pivot = keys.gather(1, pivots.gather(1, sets)[..., None].expand_as(keys))
    distance = (keys - pivot).square().sum(dim=-1, keepdim=True)
    others = (summed(torch.ones_like(distance)) - 1).clamp_min(1)
    mean = of_set(summed(distance) / others)
    weights = torch.exp(-distance / mean.clamp_min(1e-12))
    total = summed(weights)
    return summed(weights * keys) / total, summed(weights * values) / total
