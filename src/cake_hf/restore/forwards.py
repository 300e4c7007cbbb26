"""Forwards of a restore: how far one has come, that it may be left, and what the devices have done of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from cake_hf.restore.prompt import Prompt

Progress = Callable[[int, int], None]
"""Called with (chunks that are there, all chunks) now and then."""

Forward = Callable[[Callable[[], bool], dict[str, Any]], object]
"""Runs the model on one chunk with the cache: `forward(preempted, arguments)`. It raises `ForwardPreempted` at the next layer
once `preempted()` says that the chunk has come from the store meanwhile."""

GATED = "gated"
"""What a timeline calls a computed piece that waited, within its layers, for loads."""


class ForwardPreempted(Exception):
    """Not an error: the chunk that a forward computes has come from the store, so the forward is left where it is."""


class Layers:
    """How far a forward has come.

    Args:
        count: of the model's layers.

    Attributes:
        began: when its first layer did, in monotonic seconds.
        worked: seconds of a processor that the thread had had by then.
    """

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, 0
        self.began, self.worked = time.monotonic(), time.thread_time()

    def next(self) -> None:
        """A layer begins."""
        if not self._begun:
            self.began, self.worked = time.monotonic(), time.thread_time()
        self._begun += 1

    @property
    def share(self) -> float:
        """Of all layers, those that are done."""
        return min(1.0, max(0, self._begun - 1) / self._count)


def record_suffix(prompt: Prompt, devices: Sequence[torch.device], begin: float, *, gated: bool) -> None:
    """The prompt's last piece is through the model: note its span and the seconds of the whole prefill."""
    wait_for_devices(devices)
    end = time.monotonic()
    prompt.record("compute", -1, begin, end, GATED if gated else "computed")
    prompt.report.prefill_seconds = end - prompt.started


def wait_for_devices(devices: Iterable[torch.device]) -> None:
    """GPU work is queued, not done, when forward returns; the two ends can only meet if done means done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def never() -> bool:
    """Of a forward that no load overtakes."""
    return False


def no_progress(done: int, total: int) -> None:
    """Nobody is watching."""
