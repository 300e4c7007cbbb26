"""Planning: the size of chunks, where the two ends should meet, and how long the restore will take.

The formulas are those of Cake (Jin et al., "Compute Or Load KV Cache? Why Not Both?", ICML 2025, arXiv 2410.03065); what this
library adds is how holes count, and the rule not to start a compute step if the loads will arrive first. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from cake_hf.scheduling.costs import MAX_INDEX, MAX_SECONDS, Costs

Decision = Literal["compute", "load", "both"]


@dataclass(frozen=True)
class Plan:
    """The best way to restore a prefix.

    Attributes:
        decision: "compute" (nothing is loaded), "load" (everything stored is loaded) or "both". If a cost is not known, "both"
            as soon as anything is stored: meeting in the middle needs no costs.
        split: m; the first m chunks are computed, and those of the others that are stored are loaded. None if a cost is not
            known.
        predicted_seconds: time to the first token with that split; None if a cost is not known.
        curve: predicted seconds for each split 0..n; empty if a cost is not known.
    """

    decision: Decision
    split: int | None = None
    predicted_seconds: float | None = None
    curve: tuple[float, ...] = ()

    @property
    def gain(self) -> float | None:
        """Speedup over the faster of the two single methods; at least 1."""
        if not self.curve or self.predicted_seconds is None:
            return None
        better = min(self.curve[0], self.curve[-1])
        return better / self.predicted_seconds if self.predicted_seconds else 1.0


def plan(costs: Costs, stored: Sequence[bool], first: int = 0, suffix_seconds: float = 0.0) -> Plan:
    """Returns the split with the least predicted time to first token. O(n).

    If all n chunks are stored, a split m takes `max(f_0 + ... + f_(m-1), L(n - m)) + S` seconds (Cake's formula), where f_i is
    the time to compute chunk i, L(k) the time to load k chunks (`k * l` with one thread), and S the time of the suffix.

    Holes, chunks that are not stored, are computed whatever the split. Computing a hole needs all chunks before it, and loads
    arrive back to front, so a hole behind a loaded chunk waits for the last load. If chunk m is stored,
    `T(m) = max(F(m), L(stored chunks in m..n-1)) + H(m) + S`, where F(m) is the time to compute chunks 0..m-1 and H(m) the time
    to compute the holes in m..n-1. If chunk m is a hole, computing simply continues: `T(m) = T(m + 1)`. Finally,
    `T(n) = F(n) + S`.

    Both single methods are on that curve, as T(0) and T(n), so the prediction is never worse than the better of them.

    Args:
        costs: the costs of this machine, model and store.
        stored: for each chunk, whether the store has it.
        first: index of the first chunk on the absolute grid (earlier chunks are in the cache already).
        suffix_seconds: S, seconds to run the prompt's suffix once its prefix is in the cache.

    Raises:
        ValueError: `first` or `suffix_seconds` is negative, NaN or absurdly large.
    """
    if not (0 <= first <= MAX_INDEX and 0 <= suffix_seconds <= MAX_SECONDS):
        raise ValueError(
            f"The first chunk ({first}) and the suffix's seconds ({suffix_seconds}) must not be negative or absurd."
        )
    if costs.compute is None or (costs.load is None and any(stored)):
        return Plan("both" if any(stored) else "compute")
    compute = [costs.compute.seconds(first + i) for i in range(len(stored))]
    curve = _curve(compute, costs.load.finish if costs.load else lambda count: 0.0, stored, suffix_seconds)
    predicted = min(curve)
    split = curve.index(predicted)
    return Plan(_decision(stored, split), split, predicted, tuple(curve))


def _curve(
    compute: Sequence[float], finish: Callable[[int], float], stored: Sequence[bool], suffix: float
) -> list[float]:
    """Returns T(m) for each split m in 0..n; see `plan`."""
    fronts = list(accumulate(compute, initial=0.0))
    curve = [fronts[-1] + suffix]
    loads, holes = 0, 0.0
    for m in reversed(range(len(compute))):
        if stored[m]:
            loads += 1
            curve.append(max(fronts[m], finish(loads)) + holes + suffix)
        else:
            holes += compute[m]
            curve.append(curve[-1])
    return curve[::-1]


def _decision(stored: Sequence[bool], split: int) -> Decision:
    if not any(stored[split:]):
        return "compute"
    return "both" if any(stored[:split]) else "load"


ON_CPU = 128
ON_OTHERS = 512


def auto_chunk_size(device_kind: str, *, ties_images: bool = False) -> int:
    """Returns the default number of tokens per chunk. It is deterministic, since it is part of the key.

    The unstored rest of a prompt is shorter than a chunk and is computed each time. A CPU takes time for each token, so small
    chunks pay off there; a GPU runs 512 tokens in hardly more time than 32, and small chunks leave it waiting for the next
    launch. Smaller chunks also mean more files, forwards and rounding: in bfloat16, 4 of 60 answers of a small model differed
    from single-shot `generate` with chunks of 128 and none with 512, as 5 of 60 did with another attention kernel
    (eval/chunk_sizes.json).

    Args:
        device_kind: the kind of device that computes, as torch names it: "cpu", "cuda", ...
        ties_images: whether the tokens of an image attend to each other in both directions, so that an image must not be cut
            and a chunk must be longer than an image.
    """
    return ON_CPU if device_kind == "cpu" and not ties_images else ON_OTHERS


def why_chunk_size(device_kind: str) -> str:
    """Returns the rule for that kind of device, in words."""
    if device_kind == "cpu":
        return f"{ON_CPU} tokens on a CPU, where what does not fill a chunk, and is computed each time, takes time per token"
    return f"{ON_OTHERS} tokens on {device_kind}, which runs as many in hardly more time than a few"
