"""A trace with a real model: each request is answered in all ways in turn, each way with a throttled store of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.figures import Figure, Result
from benchmarks.timing import Sample
from benchmarks.traces.methods import BOTH, COMPUTE, LOAD, loads, threshold
from benchmarks.traces.prompts import Prompt, Scale, prompts_of, random_tokens, vocabulary_of
from benchmarks.traces.queueing import spread
from benchmarks.traces.requests import Trace, statistics_of
from cake_hf import CakeCache, MemoryStore
from cake_hf.limits import Limits
from cake_hf.stores.base import Store
from cake_hf.testing import ThrottledStore
from demo.asking import Answer, ask, ask_plainly

FLUSH_SECONDS = 60.0
PATIENCE = 600.0
"""Seconds after which a load counts as late: no load fails here, and those of a slow line may take long."""

FIRST = 4
"""Requests that are not counted: at first nothing is known about costs."""


@dataclass(frozen=True)
class Live:
    """How a trace is replayed with a model.

    Attributes:
        model: a causal language model.
        scale: how prompts become shorter.
        loading: seconds to load a prompt's chunks over those to compute them, in a prompt of median length.
        thresholds: stored tokens (of the shorter prompts) from which a threshold loads.
        new_tokens: of each answer.
        throttle: makes a store as slow as so many bytes per second.
    """

    model: Any
    scale: Scale
    loading: float = 1.0
    thresholds: Sequence[int] = ()
    new_tokens: int = 4
    throttle: Callable[[Store, float], Store] = ThrottledStore

    def run(self, trace: Trace, tell: Callable[[int], None] = lambda done: None) -> Result:
        """Returns the times to the first token of all ways, and whether their tokens are equal.

        Raises:
            ValueError: there are too few requests to count any.
        """
        if len(trace.requests) <= FIRST:
            raise ValueError(f"The first {FIRST} requests are not counted; {len(trace.requests)} are too few.")
        smaller = self.scale.smaller(trace)
        prompts = list(prompts_of(smaller, vocabulary_of(self.model)))
        rate = self._rate(prompts)
        names = [COMPUTE, LOAD, *map(threshold, self.thresholds), BOTH]
        stores = {name: self.throttle(MemoryStore(), rate) for name in names}
        answers: dict[str, list[Answer]] = {name: [] for name in names}
        for number, prompt in enumerate(prompts):
            for name in _turned(names, number):
                answers[name].append(self._answer(name, stores[name], prompt))
            tell(number + 1)
        title = f"{trace.name}, live, loading {self.loading:g} x computing"
        details: dict[str, object] = {
            "name": trace.name,
            "requests": len(prompts),
            "trace": asdict(statistics_of(smaller)),
            "loading": self.loading,
            "bytes_per_second": rate,
        }
        return _result(title, answers, prompts, details)

    def _answer(self, name: str, store: Store, prompt: Prompt) -> Answer:
        """Computing only is transformers alone, in chunks of the same size."""
        if name == COMPUTE:
            return ask_plainly(self.model, prompt.ids, self.new_tokens, self.scale.chunk_size)
        strategy = BOTH if name == BOTH else LOAD if loads(name, prompt.hits) else COMPUTE
        options: dict[str, Any] = {"chunk_size": self.scale.chunk_size, "limits": Limits(read_timeout=PATIENCE)}
        with CakeCache(self.model, store, strategy=strategy, **options) as cache:
            answer = ask(self.model, prompt.ids, cache, self.new_tokens)
            cache.flush(FLUSH_SECONDS)
        return answer

    def _rate(self, prompts: Sequence[Prompt]) -> float:
        size = self.scale.chunk_size
        chunks = max(2, int(median(prompt.ids.shape[1] // size for prompt in prompts)))
        ids = torch.tensor([random_tokens("calibration", chunks * size + 1, vocabulary_of(self.model))])
        seconds = min(ask_plainly(self.model, ids, 1, size).ttft for _ in range(3))
        with CakeCache(self.model, MemoryStore(), chunk_size=size, strategy=COMPUTE) as cache:
            ask(self.model, ids, cache, 1)
            cache.flush(FLUSH_SECONDS)
            return max(1.0, cache.report.bytes_saved / (self.loading * seconds))


def _result(
    title: str, answers: dict[str, list[Answer]], prompts: Sequence[Prompt], details: dict[str, object]
) -> Result:
    ttfts = {name: [answer.ttft for answer in found[FIRST:]] for name, found in answers.items()}
    figures = {}
    for name, found in ttfts.items():
        if name == COMPUTE:
            continue
        label = f"TTFT over computing only, {name}"
        ratios = Sample(tuple(one / other for one, other in zip(found, ttfts[COMPUTE], strict=True)))
        figures[name] = Figure(label, sum(found) / sum(ttfts[COMPUTE]), *ratios.spread, "x")
    plain = [answer.tokens.tolist() for answer in answers[COMPUTE]]
    other = [name for name, found in answers.items() if [answer.tokens.tolist() for answer in found] != plain]
    rows = {
        name: {
            **spread(ttfts[name]),
            "loaded": sum(answer.report.chunks_loaded for answer in found[FIRST:]),
            "computed": sum(answer.report.chunks_computed for answer in found[FIRST:]),
        }
        for name, found in answers.items()
    }
    shared = sum(prompt.hits for prompt in prompts) / sum(prompt.ids.shape[1] for prompt in prompts)
    found_details = {**details, "hit_share": shared, "other_tokens": other, "methods": rows}
    return Result(f"{title} ({_equal(other)})", figures, found_details)


def _equal(other: Sequence[str]) -> str:
    return f"OTHER TOKENS: {', '.join(other)}" if other else "the same tokens in all ways"


def _turned(names: Sequence[str], number: int) -> list[str]:
    at = number % len(names)
    return [*names[at:], *names[:at]]
