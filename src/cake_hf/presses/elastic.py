"""Elastic Cache: Efficient Inference of Vision Instruction-Following Models (Liu et al., ECCV 2024, arXiv 2407.18121)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, Press, check_share


@dataclass(frozen=True)
class ElasticCache(Press):
    """Keeps the tokens that get the most attention, merges each of the others into its nearest neighbour, and stays as small.

    The importance of a token is the attention that it gets, summed over queries and heads. The first tokens and the last are
    kept, too. A token that is not kept is merged into the kept one that is nearest by position: keys and values become the
    mean of all that meet there (section 3.2 of the paper). While the model decodes, the cache grows with a share `1 - ratio` of
    the tokens; for each token too many the entry at one fixed place is dropped (section 3.3).
    The importance is of the queries in the window, which ends at the last image; the paper takes those of the whole prompt.

    Args:
        ratio: share of the entries that go. With 0 the output is bit for bit that of the full cache.
        sinks: first tokens, which always stay.
        distance: the distance of the fixed place from the end of what is kept of the prefix.
        window: recent tokens whose queries decide.
    """

    ratio: float = 0.5
    sinks: int = 4
    distance: int = 25
    window: int = 32
    needs_queries = True

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def kept(self, tokens: int) -> int:
        """Returns the number of entries for so many tokens."""
        return max(1, int(tokens * (1 - self.ratio)))

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        keys, values, count = prefix.keys[number], prefix.values[number], self.kept(prefix.tokens)
        if not self.ratio:
            return prefix.plain_layer(number)
        importance = prefix.window[number].scores(keys).sum(dim=(0, 1))
        importance[: self.sinks] = importance[-1] = float("inf")
        anchors = importance.topk(count).indices.sort().values
        group = _nearest(anchors, prefix.tokens)
        return ElasticLayer(_means(keys, group, count), _means(values, group, count), prefix.tokens, self)


class ElasticLayer(PressedLayer):
    """Drops the entry at a fixed place for each token too many."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int, method: ElasticCache) -> None:
        super().__init__(keys, values, seen)
        self.method = method
        self.place = max(min(method.sinks, keys.shape[-2] - 1), keys.shape[-2] - method.distance)

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        surplus = self.keys.shape[-2] + key_states.shape[-2] - self.method.kept(self.seen)
        if surplus > 0:
            self.drop(self.place, self.place + surplus)
        super().append(key_states, value_states)


def _nearest(anchors: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns for each token the number of the anchor that is nearest by position; of two as near, the earlier one."""
    positions = torch.arange(tokens, device=anchors.device)
    after = torch.searchsorted(anchors, positions).clamp_max(len(anchors) - 1)
    before = (after - 1).clamp_min(0)
    return torch.where((positions - anchors[before]).abs() <= (anchors[after] - positions).abs(), before, after)


def _means(states: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the mean of the entries of each group, `[1, heads, count, head_dim]`; entries that are alone are unchanged."""
    sums = torch.zeros((*states.shape[:2], count, states.shape[-1]), device=states.device)
    sums.index_add_(2, group, states.float())
    return (sums / group.bincount(minlength=count)[:, None]).to(states.dtype)
