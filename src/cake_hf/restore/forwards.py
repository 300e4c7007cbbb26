"""Forwards of a restore: how far one has come, how it is preempted, and when the devices have finished it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from cake_hf.restore.prompt import Prompt

Progress = Callable[[int, int], None]
"""Called from time to time with (chunks that are there, all chunks)."""

Forward = Callable[[Callable[[], bool], dict[str, Any]], object]
"""Runs the model on one chunk with the cache: `forward(preempted, arguments)`. It raises `ForwardPreempted` at the next layer
once `preempted()` says that the chunk has come from the store.
"""

GATED = "gated"
"""What a timeline calls a computed piece that waited for loads within its layers."""


class ForwardPreempted(Exception):
    """Not an error: the chunk that a forward computes has come from the store, so the forward ends at the next layer."""


class Layers:
    """How far a forward has come.

    Args:
        count: of the model's layers.

    Attributes:
        began: when its first layer started, in monotonic seconds.
        worked: processor seconds that the thread had used by then.
    """

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, 0
        self.began, self.worked = time.monotonic(), time.thread_time()

    def next(self) -> None:
        """Records that a layer starts."""
        if not self._begun:
            self.began, self.worked = time.monotonic(), time.thread_time()
        self._begun += 1

    @property
    def share(self) -> float:
        """The share of the layers that is done."""
        return min(1.0, max(0, self._begun - 1) / self._count)


def record_suffix(prompt: Prompt, devices: Sequence[torch.device], begin: float, *, gated: bool) -> None:
    """Records the span of the prompt's suffix, after it has run, and the seconds of the whole prefill."""
    wait_for_devices(devices)
    end = time.monotonic()
    prompt.record("compute", -1, begin, end, GATED if gated else "computed")
    prompt.report.prefill_seconds = end - prompt.started


def wait_for_devices(devices: Iterable[torch.device]) -> None:
    """Waits for queued GPU work, which is not done when forward returns: the two ends can meet only if done means done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def never() -> bool:
    """False: for a forward that no load preempts."""
    return False


def no_progress(done: int, total: int) -> None:
    """Ignores the progress."""
