"""DBudgetKV: Dynamic Budget in KV Cache Compression (Ni et al., 2025, arXiv 2502.16886)."""

from __future__ import annotations

from dataclasses import dataclass

from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, Press, check_share


@dataclass(frozen=True)
class DBudgetKV(Press):
    """Prunes the least important entries of each layer until its attention would change too much; no budget is given.

    Entries are ranked by position: the first tokens and then the last ones matter most, so that pruning goes from the oldest
    entry after the first ones on. It stops before the norm of the attention matrix, `(||A||_F - ||A'||_F) / ||A||_F` with A'
    the matrix without the pruned columns, exceeds the threshold (section 3 of the paper, 1 % there). A has the rows of the last
    queries and all heads. Layers keep different numbers of entries. Memory: what the text allows.

    Args:
        threshold: the largest relative change of the norm. With 0 the output is bit for bit that of the full cache.
        first: tokens at the start that are never pruned.
        window: queries that are asked, and recent entries that are never pruned.
    """

    threshold: float = 0.01
    first: int = 4
    window: int = 32
    needs_queries = True

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        end = max(self.first, prefix.tokens - self.window)
        columns = prefix.window[number].scores(prefix.keys[number]).double().square().sum(dim=(0, 1))
        left = columns.sum() - columns[self.first : end].cumsum(dim=0)
        change = 1 - left.clamp_min(0).sqrt() / columns.sum().sqrt()
        pruned = int((change <= self.threshold).sum()) if self.threshold else 0
        layer = prefix.plain_layer(number)
        layer.drop(self.first, self.first + pruned)
        return layer
