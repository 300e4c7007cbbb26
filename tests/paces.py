"""What decides between computing and waiting, said by a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cake_hf.scheduling.frontier import Judge
from cake_hf.testing import RestorePace, Rules

Answer = Callable[[int], bool]


def yes(chunk: int) -> bool:
    return True


def no(chunk: int) -> bool:
    return False


def too_late(chunk: int) -> float:
    """The slack of a load that would not arrive in time."""
    return 0.5


def staged(chunk: int) -> float:
    """The slack of a load that may be late: it is staged."""
    return 1.0


def in_place(chunk: int) -> float:
    """The slack of a load that the main thread will not come to: it goes in place."""
    return math.inf


@dataclass
class Told(Judge):
    """Answers as it was told to, whatever the costs.

    Attributes:
        slacks: of each load, see `Judge.slack`.
        is_worth, is_tried: asked with the chunk.
    """

    slacks: Callable[[int], float] = staged
    is_worth: Answer = yes
    is_tried: Answer = no

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        return self.slacks(chunk)

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        return self.is_worth(chunk)

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        return self.is_tried(chunk)


class ToldPace(RestorePace):
    """Finds computing worth it as it was told to, and tries nothing."""

    def __init__(self, *beliefs: Any, worth: Answer, slack: Callable[[int], float] | None, **more: Any) -> None:
        super().__init__(*beliefs, **more)
        self._is_worth, self._slack_of = worth, slack

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        return super().slack(front, chunk, loads, now) if self._slack_of is None else self._slack_of(chunk)

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        return self._is_worth(chunk)

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        return False


def told(worth: Answer, *, slack: Callable[[int], float] | None = None, **rules: Any) -> Rules:
    """The rules of restores that decide so, and try nothing; the slack is as learnt unless it is given."""
    return Rules(pace=partial(ToldPace, worth=worth, slack=slack), **rules)


def in_ranges(number: int) -> Callable[..., int]:
    """The rule that chunks are read in so many ranges of layers, whatever was learnt."""
    return lambda *_: number
