"""VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Models (Tu et al., arXiv 2410.23317)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cake_hf.errors import CakeError
from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, Press, check_share, text_at_end


@dataclass(frozen=True)
class VLCache(Press):
    """Keeps what the text behind the images attends to; layers with sparse attention keep less.

    All is measured on the attention `A` of the text behind the last image (the paper's post-vision attention). The sparsity
    `g` of a layer is the share of its entries `A_ij < threshold * max_j A_ij` (section 4.1). Layer l keeps a share of the whole
    budget in proportion to `1 - g_l`, and at least a hundredth of its entries (section 4.2). A tenth of what it keeps are its
    most recent entries; the others are, in each head, those with the highest `sum_i A_ij` (section 4.3).

    Args:
        ratio: share of the entries of all layers that goes. With 0 the output is bit for bit that of the full cache.
        threshold: the threshold of the sparsity.
        recent: share of a layer's entries that are the most recent ones.
        window: most tokens of the text behind the last image whose attention is measured.
    """

    ratio: float = 0.5
    threshold: float = 0.01
    recent: float = 0.1
    window: int = 256
    needs_queries = True

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        check_share("threshold", self.threshold)
        check_share("recent", self.recent)

    def layers(self, prefix: Prefix) -> list[PressedLayer]:
        assert prefix.ids is not None
        if text_at_end(prefix.model, prefix.ids) == prefix.tokens:
            raise CakeError(f"{self} is made for prompts with images, and this one has none.")
        if not self.ratio:
            return [prefix.plain_layer(number) for number in range(len(prefix.keys))]
        attention = [
            recorded.scores(keys) for recorded, keys in zip(prefix.window, prefix.keys, strict=True)
        ]  # [heads, text, tokens] each
        budgets = self.budgets([sparsity(weights, self.threshold) for weights in attention], prefix.tokens)
        return [
            self._layer(prefix, number, budget, weights.sum(dim=1))
            for number, (budget, weights) in enumerate(zip(budgets, attention, strict=True))
        ]

    def budgets(self, sparse: list[float], tokens: int) -> list[int]:
        """Returns the entries that each layer keeps, for the layers' sparsities."""
        dense = [max(1 - one, 1e-6) for one in sparse]
        whole = len(sparse) * (1 - self.ratio)
        shares = [min(1.0, max(0.01, whole * one / sum(dense))) for one in dense]
        return [max(1, int(tokens * share)) for share in shares]

    def _layer(self, prefix: Prefix, number: int, budget: int, scores: torch.Tensor) -> PressedLayer:
        if budget == prefix.tokens:
            return prefix.plain_layer(number)
        keys, values = prefix.keys[number], prefix.values[number]
        scores = scores.unflatten(0, (keys.shape[1], -1)).sum(dim=1)
        scores[:, prefix.tokens - int(budget * self.recent) :] = float("inf")
        kept = scores.topk(budget, dim=-1).indices.sort(dim=-1).values[None, ..., None]
        keys, values = (states.gather(2, kept.expand(-1, -1, -1, states.shape[-1])) for states in (keys, values))
        return PressedLayer(keys, values, prefix.tokens)


def sparsity(weights: torch.Tensor, threshold: float) -> float:
    """Returns the share of attention weights `[heads, text, tokens]` that are below a share of their row's highest.

    Those of tokens that come later than the query do not count.
    """
    text, tokens = weights.shape[-2:]
    seen = torch.ones((text, tokens), dtype=torch.bool, device=weights.device).tril(tokens - text)
    small = weights < threshold * weights.amax(dim=-1, keepdim=True)
    return float((small & seen).sum() / (seen.sum() * weights.shape[0]))
