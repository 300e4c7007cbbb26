"""What decides between computing and waiting, said by a test."""

from __future__ import annotations

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


@dataclass
class Told(Judge):
    """Answers as it was told to, whatever the costs.

    Attributes:
        chunks: see `Judge.near`.
        is_worth, is_overdue, is_tried: asked with the chunk.
    """

    chunks: int = 0
    is_worth: Answer = yes
    is_overdue: Answer = no
    is_tried: Answer = no

    def near(self, now: float) -> int:
        return self.chunks

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        return self.is_worth(chunk)

    def may_be_worth(self, chunk: int, loads_left: int, now: float) -> bool:
        return self.is_worth(chunk)

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        return self.is_tried(chunk)

    def overdue(self, chunk: int, loads_left: int, now: float) -> bool:
        return self.is_overdue(chunk)


def tell(monkeypatch: pytest.MonkeyPatch, worth: Answer, overdue: Answer = no) -> None:
    """Have every restore decide so, and try nothing."""

    def worth_it(pace: RestorePace, chunk: int, *_: object, **__: object) -> bool:
        return worth(chunk)

    monkeypatch.setattr(RestorePace, "worth", worth_it)
    monkeypatch.setattr(RestorePace, "may_be_worth", worth_it)
    monkeypatch.setattr(RestorePace, "tries", lambda *_: False)
    monkeypatch.setattr(RestorePace, "overdue", lambda pace, chunk, *_: overdue(chunk))
