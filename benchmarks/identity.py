"""What does it cost to identify a model by its content? Times the checksum over all weights, made once per model.

A module of 500 MB of bfloat16 weights is hashed from scratch in each round, and then looked at again as every later prompt
does (addresses, version counters, a few samples).
"""

from __future__ import annotations

import time

import torch

from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample
from benchmarks.workbench import Workbench
from cake_hf.model.fingerprint import weights_digest

SOON_DONE = Goal(0.2)
WEIGHT_BYTES = 500 * 10**6
TENSORS = 100


def measure(bench: Workbench) -> Result:
    """Times the checksum of new modules, and the second look at each."""
    rounds = [_hash_new_module(WEIGHT_BYTES) for _ in range(bench.settings.repeats)]
    return Result(
        f"Knowing a model by its content ({WEIGHT_BYTES // 10**6} MB of weights)",
        {
            "first_seconds": Figure.of("checksum, once per model", Sample(tuple(r[0] for r in rounds)), goal=SOON_DONE),
            "again_seconds": Figure.of("the look at later prompts", Sample(tuple(r[1] for r in rounds))),
        },
    )


def _hash_new_module(nbytes: int) -> tuple[float, float]:
    """Returns the seconds of the first and of the second digest of a new module."""
    module = torch.nn.Module()
    for number in range(TENSORS):
        weight = torch.zeros(nbytes // TENSORS // 2, dtype=torch.bfloat16).fill_(number + 1)
        module.register_parameter(f"weight_{number}", torch.nn.Parameter(weight, requires_grad=False))
    times = [time.perf_counter()]
    for _ in range(2):
        weights_digest(module)
        times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]
