"""The stages of the check, the most important first, each with the seconds that it may take. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUDGET = 530.0
"""Seconds for all stages: nine minutes, less ten seconds for what is around them."""


@dataclass(frozen=True)
class Stage:
    """One of them.

    Attributes:
        name: on the command line, in the results.
        title: for people.
        seconds: that it is always given, if the budget lasts.
    """

    name: str
    title: str
    seconds: float


STAGES = (
    Stage("ceilings", "What the machine can do at best", 20),
    Stage("parity", "Restored prompts, bit for bit", 90),
    Stage("attention", "The first attention, bit for bit", 20),
    Stage("ttft", "Time to the first token", 185),
    Stage("loading", "Loading into place", 55),
    Stage("decoding", "Decoding", 40),
    Stage("saving", "Saving", 40),
    Stage("layerwise", "Layer-wise arrival", 30),
    Stage("codecs", "Smaller KV", 10),
    Stage("device_codec", "Decoding KV on the device", 15),
    Stage("serving", "One long prefix and many short requests", 25),
)


def choose(stages: Sequence[Stage], first: str = "", only: Sequence[str] = ()) -> list[Stage]:
    """The stages to run, in their order.

    Args:
        stages: all.
        first: where to begin; empty for the begin.
        only: names of those to take; empty for all.

    Raises:
        ValueError: there is no such stage, or none is left.
    """
    names = [stage.name for stage in stages]
    for name in filter(None, (first, *only)):
        if name not in names:
            raise ValueError(f"There is no stage {name!r}; choose from {', '.join(names)}.")
    rest = stages[names.index(first) if first else 0 :]
    chosen = [stage for stage in rest if not only or stage.name in only]
    if not chosen:
        raise ValueError(f"Of {', '.join(only)} no stage is left from {first!r} on.")
    return chosen
