"""What does a token cost once the prompt is there? Decoding with a `CakeCache` against decoding with a `DynamicCache`.

`DynamicCache` makes a new tensor and copies all KV for each token; `CakeCache` appends in place. Both start from the same KV
of the same prompt and get the same tokens. They take turns token by token, alternating in who goes first, and every step's
logits are compared. One step is one forward of the model: what `generate` adds is the same for both. The first step is shown
by itself: on a CPU, it makes the `CakeCache` head-major, which no other figure includes.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.figures import Figure, Goal, Result
from benchmarks.models import plain_copy
from benchmarks.timing import Sample
from benchmarks.workbench import Workbench, synchronize
from cake_hf.layers.compat import named_for

NOT_SLOWER = Goal(1.0)
FASTER = Goal(0.9)
LONG_CONTEXT = 32 * 2**10
"""Tokens from which on the copies that we avoid must show."""

WARM_UP_STEPS = 2


def measure(bench: Workbench) -> Result:
    """Times single tokens, interleaved."""
    with bench.cache(bench.filled_store()) as cake:
        bench.generate(cake, "before decoding")
        caches = {"cake": cake, "dynamic": plain_copy(bench.model, cake)}
        seconds = _decode(bench, caches)
    ours, theirs = (Sample(tuple(1e3 * s for s in seconds[name][WARM_UP_STEPS:])) for name in caches)
    our_first, their_first = (Sample((seconds[name][0],)) for name in caches)
    goal = FASTER if bench.settings.tokens >= LONG_CONTEXT else NOT_SLOWER
    return Result(
        f"Decoding at {bench.settings.tokens:,} tokens of context",
        {
            "cake_milliseconds": Figure.of("per token, CakeCache", ours, "ms"),
            "dynamic_milliseconds": Figure.of("per token, DynamicCache", theirs, "ms"),
            "ratio": Figure.ratio("CakeCache over DynamicCache", ours, theirs, goal),
            "first_ratio": Figure.ratio("the same for the first token", our_first, their_first),
        },
    )


def _decode(bench: Workbench, caches: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the seconds of each step, for each cache."""
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    names = list(caches)
    token = torch.zeros((1, 1), dtype=torch.long, device=bench.settings.device)
    _rehearse(bench, token, caches)
    for step in range(WARM_UP_STEPS + bench.settings.decode_steps):
        logits = {}
        for name in names if step % 2 == 0 else names[::-1]:
            begin = time.perf_counter()
            logits[name] = _forward(bench.model, token, caches[name])
            synchronize(bench.settings.device)
            seconds[name].append(time.perf_counter() - begin)
        _compare(bench, logits, step)
        token = logits[names[1]][:, -1:].argmax(-1)
    return seconds


def _rehearse(bench: Workbench, token: torch.Tensor, caches: dict[str, Any]) -> None:
    """Runs first tokens: kernels chosen or built then are no cost of a cache. On a GPU that may happen again for each length
    (cuDNN)."""
    if not _chooses_by_length(bench.settings.device):
        _forward(bench.model, token, plain_copy(bench.model, caches["cake"]))
        return
    steps = WARM_UP_STEPS + bench.settings.decode_steps
    for cache in caches.values():
        for _ in range(steps):
            _forward(bench.model, token, cache)
        cache.crop(-steps)


def _chooses_by_length(device: str) -> bool:
    return torch.device(device).type != "cpu"


def _forward(model: Any, token: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=token, use_cache=True, logits_to_keep=1, **named_for(model, cache))
    logits: torch.Tensor = output.logits
    return logits


def _compare(bench: Workbench, logits: dict[str, torch.Tensor], step: int) -> None:
    bench.parity.checks += 1
    if not torch.equal(logits["cake"], logits["dynamic"]):
        bench.parity.mismatches.append(f"decoding, step {step}: the logits differ from DynamicCache's")
