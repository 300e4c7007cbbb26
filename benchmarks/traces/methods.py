"""What each method makes of a request that is served alone: seconds to the first token, on the simulator.

- compute: nothing is loaded.
- load: all stored blocks are loaded, the others computed. The library's own strategy "load", so the suffix runs through each
  layer as soon as it has arrived, which engines do not all do.
- a threshold: load if at least so many tokens are stored, else compute. As LMCache's `min_retrieve_tokens`, or the length from
  which a router sends a prompt to where its prefix is stored.
- both: the library's strategy "both", with its planner as it is. It knows nothing at first and learns from each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from benchmarks.simulation.simulator import Setting, simulate, simulate_prompts
from benchmarks.traces.requests import Trace
from benchmarks.traces.serving import Serving
from benchmarks.traces.stored import hits_of
from cake_hf.scheduling.learning import CostLearner

COMPUTE, LOAD, BOTH = "compute", "load", "both"
THRESHOLDS = (1024, 2048, 4096, 8192, 13_600, 32_768)
"""Tokens. 13,600 is what a router's documentation calls the crossover."""


@dataclass(frozen=True)
class Visit:
    """One request, with what is stored of it.

    Attributes:
        time: of its arrival.
        tokens: of the prompt.
        hits: stored tokens of its prefix.
        compute, load, both: seconds to the first token.
        line: the part of loading that is on the line, in seconds.
        rest: seconds to compute what is not stored.
    """

    time: float
    tokens: int
    hits: int
    compute: float
    load: float
    both: float
    line: float
    rest: float

    @property
    def better(self) -> float:
        """Seconds of the better single method."""
        return min(self.compute, self.load)

    def seconds(self, method: str) -> float:
        """Returns the seconds of a method: one of the three, or a threshold as `threshold` names it."""
        if method in (COMPUTE, LOAD, BOTH):
            return float(getattr(self, method))
        return self.load if loads(method, self.hits) else self.compute


AT_LEAST = "load from "


def loads(method: str, hits: int) -> bool:
    """Returns whether a single method loads a prefix of so many stored tokens."""
    least = 1 if method == LOAD else _tokens_of(method) if method.startswith(AT_LEAST) else None
    return least is not None and hits >= max(1, least)


def threshold(tokens: int) -> str:
    """Returns the name of the method that loads from so many stored tokens on."""
    return f"{AT_LEAST}{tokens:,}"


def _tokens_of(method: str) -> int:
    return int(method.removeprefix(AT_LEAST).replace(",", ""))


def methods(thresholds: Sequence[int] = THRESHOLDS) -> list[str]:
    """Returns the names of all methods, in the order of a table."""
    return [COMPUTE, LOAD, *map(threshold, thresholds), BOTH]


def visits_of(trace: Trace, serving: Serving, capacity: int | None = None, warm: int = 0) -> list[Visit]:
    """Serves each request alone, in order; what is stored follows from those before it.

    Args:
        trace: with blocks of the cost curves' size.
        serving: what serves it.
        capacity: blocks in the store; None for no limit.
        warm: so many requests at the beginning only fill the store.
    """
    learner, visits = CostLearner(), []
    for request, hits in list(zip(trace.requests, hits_of(trace, capacity), strict=True))[warm:]:
        blocks = len(request.blocks)
        suffix = request.tokens - blocks * trace.block
        single = _single(serving, blocks, hits, suffix)
        both = single[0]
        if blocks:
            both = simulate_prompts([serving.setting(blocks, hits, suffix)], learner)[0].seconds
        visits.append(Visit(request.time, request.tokens, hits * trace.block, single[0], single[1], both, *single[2:]))
    return visits


@lru_cache(maxsize=100_000)
def _single(serving: Serving, blocks: int, hits: int, suffix: int) -> tuple[float, float, float, float]:
    """Returns seconds to compute all, and to load what is stored; and of these on the line, and for the rest."""
    steps, last = serving.step_seconds(blocks), serving.suffix_seconds(blocks, suffix)
    compute, rest = sum(steps) + last, sum(steps[hits:]) + last
    if hits == 0:
        return compute, compute, 0.0, rest
    setting: Setting = serving.setting(blocks, hits, suffix)
    return compute, simulate(setting, "load").seconds, setting.line.finish(hits), rest
