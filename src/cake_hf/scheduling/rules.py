"""The rules of a restore that tests replace: they are handed in, so that nothing has to be patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.layer_gate import ranges_of
from cake_hf.scheduling.pace import RestorePace


@dataclass(frozen=True)
class Rules:
    """What decides, in the restores of a cache, whether a chunk is loaded or computed, and how it is read.

    Attributes:
        pace: makes the pace of each restore.
        ranges: chooses the number of layer ranges in which the last chunks are read; see `layer_gate.ranges_of`.
    """

    pace: Callable[..., RestorePace] = RestorePace
    ranges: Callable[[Costs, int, float], int] = ranges_of
