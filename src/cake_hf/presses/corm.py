"""CORM: Cache Optimization with Recent Message for LLM Inference (Dai et al., 2024, arXiv 2404.15949)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cake_hf.presses.attention import Attended, AttentionCall
from cake_hf.presses.layers import PressedLayer, RaggedLayer, causal_mask
from cake_hf.presses.press import Prefix, Press


@dataclass(frozen=True)
class CORM(Press):
    """Evicts entries that none of the last queries found important, now and while the model decodes.

    A key is important to a query that sees t keys if its attention weight is at least 1/t (definition 3.1 of the paper). Each
    head keeps the keys that are important to one of the last `window` queries of a head in its group, and the last `window`
    keys. There is no preset budget, and heads keep different numbers of entries. Memory: those entries, and four bytes each.

    Args:
        window: queries that have a say, and entries that are never evicted (w = r in the paper, 256 there). If it is longer
            than the prompt nothing is evicted, and the output is bit for bit that of the full cache.
    """

    window: int = 256
    needs_queries = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is a number of queries, at least 1, not {self.window!r}.")

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        keys, values = prefix.keys[number], prefix.values[number]
        layer = CormLayer(*_by_head(keys, values), prefix.tokens, self.window)
        if self.window >= prefix.tokens:
            return layer
        weights = prefix.window[number].scores(keys)[:, -self.window :]
        found = important(weights, prefix.tokens).unflatten(0, (keys.shape[1], -1)).any(dim=1)
        for head, messages in enumerate(found):
            layer.note(head, messages)
        layer.asked = self.window
        layer.evict()
        return layer


class CormLayer(RaggedLayer):
    """Notes which query was the last to find an entry important, and evicts entries that no recent query did.

    Args:
        keys, values, seen: as for `RaggedLayer`.
        window: as for `CORM`.

    Attributes:
        asked: queries that were noted.
        last: of each head and entry, the number of the query that found it important last; -1 for none.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], seen: int, window: int) -> None:
        super().__init__(keys, values, seen)
        self.window, self.asked = window, 0
        self.last = [torch.full(key.shape[2:3], -1, dtype=torch.int32, device=key.device) for key in keys]

    def attend(self, call: AttentionCall) -> Attended:
        result = super().attend(call)
        for head, group in enumerate(call.query.chunk(len(self.head_keys), dim=1)):
            products = (group[0] @ self.head_keys[head][0].transpose(-1, -2)).float() * call.attention.scaling
            if (hidden := causal_mask(call.query, products.shape[-1])) is not None:
                products = products + hidden[0]
            self.note(head, important(products.softmax(dim=-1), products.shape[-1]).any(dim=0))
        self.asked += call.query.shape[-2]
        self.evict()
        return result

    def note(self, head: int, messages: torch.Tensor) -> None:
        """Notes which entries new queries found important: `[queries, entries]`."""
        numbers = torch.arange(self.asked, self.asked + len(messages), dtype=torch.int32, device=messages.device)
        found = torch.where(messages, numbers[:, None], -1).amax(dim=0)
        old = self.last[head]
        self.last[head] = torch.maximum(torch.nn.functional.pad(old, (0, len(found) - len(old)), value=-1), found)

    def evict(self) -> None:
        """Drops the entries of each head that are neither recent nor important to one of the last queries."""
        if self.asked < self.window:
            return
        for head, last in enumerate(self.last):
            kept = last >= self.asked - self.window
            kept[-self.window :] = True
            if not bool(kept.all()):
                self.last[head] = last[kept]
                self.head_keys[head] = self.head_keys[head][:, :, kept]
                self.head_values[head] = self.head_values[head][:, :, kept]

    def state(self) -> list[torch.Tensor]:
        return [*super().state(), *self.last]


def important(weights: torch.Tensor, visible: int) -> torch.Tensor:
    """Returns which weights `[..., queries, keys]` are at least those of even attention; the last query sees `visible` keys."""
    queries = weights.shape[-2]
    counts = torch.arange(visible - queries + 1, visible + 1, device=weights.device)
    return weights >= (1 / counts)[:, None]


def _by_head(keys: torch.Tensor, values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [one.clone() for one in keys.split(1, dim=1)], [one.clone() for one in values.split(1, dim=1)]
