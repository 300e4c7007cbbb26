"""What decides between computing and waiting, said by a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cake_hf.restore.pacing import RestorePace
from cake_hf.scheduling.frontier import Judge

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


def tell(monkeypatch: pytest.MonkeyPatch, worth: Answer) -> None:
    """Have every restore decide so, and try nothing."""

    def worth_it(pace: RestorePace, chunk: int, *_: object, **__: object) -> bool:
        return worth(chunk)

    monkeypatch.setattr(RestorePace, "worth", worth_it)
    monkeypatch.setattr(RestorePace, "tries", lambda *_: False)
