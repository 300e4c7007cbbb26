"""A plugin that has every restore come through the place that serves GPUs, with copies that are as late as they may be.

PYTHONPATH=tests pytest -p late_copies tests/test_parity.py

A GPU copies while the processor goes on. Here a copy is done when it is waited for, and not before. Code that forgets to wait
sees what was in the buffers until then; code that fills a slot too early spoils a copy from it. What is saved is copied out
when the model's stream is told to wait for that; code that changes it before spoils what is stored.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

import pytest
import torch

from cake_hf.transfer import landing as place
from cake_hf.transfer.copy_streams import CopyStreams
from waiting import PATIENCE

Copy = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
Work = Callable[[], None]


class LateCopies(CopyStreams):
    """One stream for all buffers, wherever they are."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        super().__init__([])
        self._queue: deque[Work] = deque()
        self._lock = Lock()
        self._begun = self._done = 0

    def copy(self, places: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> None:
        self.run(places[0].device, partial(torch._foreach_copy_, places, pieces))

    def run(self, device: torch.device, work: Work) -> None:
        with self._lock:
            self._queue.append(work)
            self._begun += 1

    def marks(self, devices: Iterable[torch.device]) -> list[Any]:
        with self._lock:
            return [Event(self, self._begun)] if list(devices) else []

    def catch_up(self) -> None:
        self.do(self._begun)

    def do(self, count: int) -> None:
        """The first copies, as many, in order."""
        with self._lock, torch.inference_mode():
            while self._done < count:
                self._done += 1
                self._queue.popleft()()


class Event:
    """After so many copies."""

    def __init__(self, stream: LateCopies, count: int) -> None:
        self._stream, self._count = stream, count

    def synchronize(self) -> None:
        self._stream.do(self._count)


class LateCopiesOut:
    """What is saved or compared, on its way to the host.

    Attributes:
        awaited_by: the names of the threads that have waited for some of it.
    """

    def __init__(self) -> None:
        self.awaited_by: set[str] = set()
        self._queue: deque[tuple[Copy, threading.Event]] = deque()
        self._lock = Lock()

    def copy_out(self, places: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> list[Any]:
        done = threading.Event()
        with self._lock:
            self._queue.append(((places, pieces), done))
        return [CopiedOut(self, done)]

    def end(self) -> None:
        """Stands in for `let_copies_out_end`."""
        with self._lock, torch.inference_mode():
            while self._queue:
                copy, done = self._queue.popleft()
                torch._foreach_copy_(*copy)
                done.set()


class CopiedOut:
    """The writer is patient: it must not be what has a copy done. Who else awaits one cannot go on without."""

    def __init__(self, copies: LateCopiesOut, done: threading.Event) -> None:
        self._copies, self._done = copies, done

    def synchronize(self) -> None:
        name = threading.current_thread().name
        self._copies.awaited_by.add(name)
        if name != "cake-writer":
            self._copies.end()
        assert self._done.wait(PATIENCE)


class LateLanding(place._DeviceLanding):
    """All of its places are on the GPU, so to say."""

    def _bring(self, first: int, places: Sequence[torch.Tensor]) -> None:
        self._copied_to |= {one.device for one in places}
        self._streams.copy(places, self._pieces[first : first + len(places)])


@contextmanager
def late_copies(kind: type[place.DevicePlace] = place.DevicePlace) -> Iterator[LateCopiesOut]:
    """All restores in the body, see above, through places of that kind; what is saved meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cake_hf.restore.restore.place_for", kind)
        patch.setattr(place, "CopyStreams", LateCopies)
        patch.setattr(place, "_DeviceLanding", LateLanding)
        out = LateCopiesOut()
        patch.setattr("cake_hf.transfer.writer.copy_out", out.copy_out)
        for user in ("bound_store", "restore"):
            patch.setattr(f"cake_hf.restore.{user}.let_copies_out_end", out.end)
        yield out


@pytest.fixture(autouse=True)
def _late_copies() -> Iterator[None]:
    with late_copies():
        yield
