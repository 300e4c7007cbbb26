"""ThinK: Thinner Key Cache by Query-Driven Pruning (Xu et al., ICLR 2025, arXiv 2407.21018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cake_hf.presses.attention import Attended, AttentionCall, grouped, weighed
from cake_hf.presses.layers import PressedLayer, causal_mask
from cake_hf.presses.press import Prefix, Press, check_share


@dataclass(frozen=True)
class ThinK(Press):
    """Drops channels of the keys, those that the last queries use least; values stay whole.

    The score of channel i of a head is `||Q_i K_i^T||_F = ||Q_i|| ||K_i||` (section 3.2 of the paper), with the queries of the
    window, summed over the heads that share the keys. The keys of the window itself and of later tokens keep all channels.
    Memory: a share `ratio` of the keys less, so half of that of the KV.

    Args:
        ratio: share of the channels that are dropped. With 0 the output is bit for bit that of the full cache.
        window: recent tokens whose queries decide.
    """

    ratio: float = 0.5
    window: int = 32
    needs_queries = True

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        keys, values = prefix.keys[number], prefix.values[number]
        dropped = int(keys.shape[-1] * self.ratio)
        recent = min(self.window, prefix.tokens)
        if not dropped or recent == prefix.tokens:
            return prefix.plain_layer(number)
        queries = prefix.window[number].queries[:, :, -recent:]
        strength = queries.float().norm(dim=-2).unflatten(1, (keys.shape[1], -1)).square().sum(dim=2).sqrt()
        scores = strength * keys.float().norm(dim=-2)
        kept = scores.topk(keys.shape[-1] - dropped, dim=-1).indices.sort(dim=-1).values
        old, new = keys[:, :, :-recent], keys[:, :, -recent:]
        thin = old.gather(-1, kept[:, :, None].expand(-1, -1, old.shape[-2], -1))
        return ThinLayer(thin, kept, new.clone(), values, prefix.tokens)


class ThinLayer(PressedLayer):
    """Keeps the older keys without some of their channels.

    Args:
        thin: older keys `[1, heads, tokens, kept channels]`.
        kept: `[1, heads, kept channels]`, the channels' numbers.
        keys: recent keys, with all channels.
        values: the values of all tokens.
        seen: as for `PressedLayer`.
    """

    def __init__(
        self, thin: torch.Tensor, kept: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: int
    ) -> None:
        super().__init__(keys, values, seen)
        self.thin, self.kept = thin, kept

    def attend(self, call: AttentionCall) -> Attended:
        attention, query, keys, values, _ = call
        attention.require_plain("ThinK")
        query = grouped(query, keys.shape[1])
        channels = self.kept[:, :, None, None].expand(*query.shape[:-1], -1)
        scores = torch.cat(
            [
                query.gather(-1, channels) @ self.thin[:, :, None].transpose(-1, -2),
                query @ keys[:, :, None].transpose(-1, -2),
            ],
            dim=-1,
        )
        scores = scores * attention.scaling
        return weighed(scores, values[:, :, None], causal_mask(query, scores.shape[-1]))[0], None

    def state(self) -> list[torch.Tensor]:
        return [self.thin, self.kept, *super().state()]

    @property
    def entries(self) -> float:
        return float(self.values.shape[-2])
