"""Compute-only, load-only and both on a store as slow as the model: the case in which a single side wastes the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from cake_hf.cache import CakeCache
from cake_hf.limits import Limits
from cake_hf.stores import Store
from cake_hf.testing import ThrottledStore
from demo.asking import Answer, ask_with_store

STRATEGIES = ("compute", "load", "both")
RACE_SECONDS = 20.0
"""No new round starts after that time; there is always one round."""


@dataclass
class Race:
    """All runs of all strategies.

    Attributes:
        bytes_per_second: of the throttled store.
        runs: strategy -> its answers, in order.
    """

    bytes_per_second: float
    runs: dict[str, list[Answer]] = field(default_factory=lambda: {strategy: [] for strategy in STRATEGIES})

    def seconds(self, strategy: str) -> float:
        """Median time to the first token."""
        return median(answer.ttft for answer in self.runs[strategy])

    def middle_run(self, strategy: str) -> Answer:
        """The run with the median time, or the one just above it."""
        ordered = sorted(self.runs[strategy], key=lambda answer: answer.ttft)
        return ordered[len(ordered) // 2]

    @property
    def answers(self) -> list[Answer]:
        """The answers of all strategies."""
        return [answer for answers in self.runs.values() for answer in answers]

    @property
    def gain(self) -> float:
        """How many times faster both sides together are than the better of them alone."""
        return min(self.seconds("compute"), self.seconds("load")) / self.seconds("both")


def run_race(
    model: Any,
    ids: torch.Tensor,
    store: Store,
    chunk_size: int,
    chunk_bytes: float,
    repeats: int,
    progress: Callable[[int, int], None],
) -> Race:
    """Times the strategies in turn, so that a change of the machine's speed affects all of them.

    The first compute-only run sets the bandwidth: reading all chunks takes as long as computing them.

    Args:
        model: a causal language model.
        ids: `[1, tokens]`, of a prompt whose chunks the store has.
        store: not throttled.
        chunk_size: tokens.
        chunk_bytes: of one chunk.
        repeats: rounds, each of one run per strategy.
        progress: called with (runs done, all runs).
    """
    begin, total = time.monotonic(), repeats * len(STRATEGIES)
    first = _run(model, ids, store, chunk_size, "compute", Limits())
    seconds = max(1e-6, sum(span.end - span.start for span in first.report.timeline if span.chunk >= 0))
    chunks = (ids.shape[1] - 1) // chunk_size
    race = Race(chunks * chunk_bytes / seconds)
    race.runs["compute"].append(first)
    slow = ThrottledStore(store, race.bytes_per_second)
    limits = Limits(read_timeout=max(10.0, 10 * seconds / chunks))
    for _ in range(repeats):
        for strategy in STRATEGIES:
            if strategy != "compute" or len(race.runs["compute"]) == len(race.runs["both"]):
                race.runs[strategy].append(_run(model, ids, slow, chunk_size, strategy, limits))
            progress(len(race.answers), total)
        if time.monotonic() - begin > RACE_SECONDS:
            break
    return race


def _run(model: Any, ids: torch.Tensor, store: Store, chunk_size: int, strategy: str, limits: Limits) -> Answer:
    cache = CakeCache(model, store, chunk_size=chunk_size, strategy=strategy, save=False, limits=limits)
    return ask_with_store(model, ids, 1, cache)
