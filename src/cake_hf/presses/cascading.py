"""Cascading KV: Training-Free Exponential Context Extension via Cascading KV Cache (Willette et al., arXiv 2406.17808)."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import torch

from cake_hf.presses.attention import Attended, AttentionCall, attended, grouped
from cake_hf.presses.layers import PressedLayer, causal_mask
from cake_hf.presses.press import Prefix, Press, check_share


@dataclass(frozen=True)
class CascadingKV(Press):
    """Keeps the first tokens and a row of sub-caches, each of which takes every second token that the one before it drops.

    Sub-cache i takes what the one before it drops if the number of the token that came in is a multiple of `2^i`. Else the
    dropped token replaces the newest one of sub-cache i if its score is not less, so the tokens that stay reach back ever
    further, ever more thinly (section 3.1 of the paper). Until the budget is full, every token is taken. The score is the
    moving average of attention `mu = decay * mu + (1 - decay) * s`, the mean over the heads. The budget holds while the model
    decodes.
    Two things are other than in the paper: tokens keep their positions, where the paper counts those in the cache; and the
    scores of the prefix are of the window's queries, since a restore brings no queries.

    Args:
        ratio: share of the prefix that is dropped. With 0 the output is bit for bit that of the full cache, and nothing is
            dropped later.
        caches: number of sub-caches.
        sinks: first tokens, which always stay.
        decay: the decay of the moving average.
        window: recent tokens whose queries make the scores.
    """

    ratio: float = 0.5
    caches: int = 4
    sinks: int = 64
    decay: float = 0.999
    window: int = 32
    needs_queries = True

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        check_share("decay", self.decay)
        if self.caches < 1:
            raise ValueError(f"caches is at least 1, not {self.caches!r}.")

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        if not self.ratio:
            return prefix.plain_layer(number)
        weights = prefix.window[number].scores(prefix.keys[number]).mean(dim=0)
        return CascadingLayer(prefix.keys[number], prefix.values[number], self, weights)


class Cascade:
    """Which tokens stay, by their numbers. The newest token of a sub-cache is its last.

    Args:
        sizes: the sizes of the sub-caches, the one for new tokens first.
        sinks: first tokens, which always stay.
    """

    def __init__(self, sizes: list[int], sinks: int) -> None:
        self.sizes, self.sinks = sizes, sinks
        self.held: list[deque[int]] = [deque() for _ in sizes]

    def add(self, token: int, score: dict[int, float]) -> int | None:
        """Takes the next token; returns the one that is dropped for it, or None.

        Args:
            token: its number.
            score: the score of all tokens that are held, and of this one.
        """
        if token < self.sinks:
            return None
        moved, full = token, token - self.sinks >= sum(self.sizes)
        for level, (held, size) in enumerate(zip(self.held, self.sizes, strict=True)):
            if len(held) < size:
                held.append(moved)
                return None
            if full and (token - self.sinks) % 2**level:
                if score[moved] < score[held[-1]]:
                    return moved
                replaced = held.pop()
                held.append(moved)
                return replaced
            held.append(moved)
            moved = held.popleft()
        return moved


class CascadingLayer(PressedLayer):
    """Keeps what a cascade holds, in the order of positions.

    Args:
        keys, values: of the whole prefix.
        method: the options.
        weights: attention weights `[queries, tokens]` of the last queries of the prefix.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, method: CascadingKV, weights: torch.Tensor) -> None:
        tokens = keys.shape[-2]
        super().__init__(keys, values, tokens)
        budget = int(tokens * (1 - method.ratio))
        sinks = min(method.sinks, budget)
        sizes = [(budget - sinks + number) // method.caches for number in reversed(range(method.caches))]
        self.decay = method.decay
        self.cascade = Cascade([size for size in sizes if size], sinks)
        self.tokens = list(range(tokens))
        self.score = torch.zeros(tokens)
        self._note(weights)
        self._settle(0)

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().append(key_states, value_states)
        new = key_states.shape[-2]
        self.tokens += range(self.seen - new, self.seen)
        self.score = torch.cat([self.score, torch.zeros(new)])

    def attend(self, call: AttentionCall) -> Attended:
        """Computes attention on what is kept and the new tokens; then these enter the cascade."""
        attention, query, keys, values, _ = call
        attention.require_plain("CascadingKV")
        output, weights = attended(
            grouped(query, keys.shape[1]),
            keys[:, :, None],
            values[:, :, None],
            attention.scaling,
            causal_mask(query, keys.shape[-2]),
        )
        self._note(weights[0].flatten(0, 1).mean(dim=0))
        self._settle(self.settled)
        return output, None

    def _note(self, weights: torch.Tensor) -> None:
        """Adds attention weights `[queries, kept]` to the moving averages."""
        ages = torch.arange(weights.shape[0] - 1, -1, -1)
        self.score = self.score * self.decay ** weights.shape[0]
        self.score += (1 - self.decay) * (self.decay**ages) @ weights.cpu()

    def _settle(self, first: int) -> None:
        """Puts tokens from this number on into the cascade, and forgets what it drops."""
        score = dict(zip(self.tokens, self.score.tolist(), strict=True))
        new = self.tokens[bisect_left(self.tokens, first) :]
        self.settled = self.seen
        dropped = {self.cascade.add(token, score) for token in new} - {None}
        if dropped:
            rows = torch.tensor(
                [row for row, token in enumerate(self.tokens) if token not in dropped], dtype=torch.long
            )
            self.tokens, self.score = [token for token in self.tokens if token not in dropped], self.score[rows]
            self.keys, self.values = (
                states.index_select(-2, rows.to(states.device)) for states in (self.keys, self.values)
            )
