"""Competing processes that leave us a share of the device, and rest when told to.

Fair scheduling gives k competitors on a core at most `k / (k + 1)` of it, and each what it wants below that. So k processes
per core, each wanting `(1 - share) / k`, leave us `share` as long as `k >= 1 / share - 1`. A GPU's driver gives processes
slices of time, which has about the same effect. Threads that wait for the slowest of them get less. The share that was really
left is measured in every round: the plain computation's time while they rest over that while they work.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch

from cake_hf.errors import CakeError

LEAST_SHARE = 0.1
"""Below this there would be more than nine processes per core."""
END_SECONDS = 10.0
SCRIPT = Path(__file__).with_name("competitor.py")


class Competition:
    """The competing processes; they start when they are first told to work. With a share of 1 there are none.

    Args:
        share: of the device to be left to us, from LEAST_SHARE to 1.
        device: as torch names it.

    Raises:
        ValueError: the share is out of range.
    """

    def __init__(self, share: float, device: str) -> None:
        if not LEAST_SHARE <= share <= 1:
            raise ValueError(f"The share of compute left must be from {LEAST_SHARE:g} to 1, got {share:g}.")
        each, part = demand(share)
        command = [sys.executable, "-I", str(SCRIPT), device, f"{part:.6f}"]
        cores = [[]] if torch.device(device).type == "cuda" else [[str(core)] for core in usable_cores()]
        self._commands = [command + core for core in cores * each]
        self._ends = ExitStack()
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Competition:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()
        self._processes = []

    @contextmanager
    def working(self) -> Iterator[None]:
        """Lets the processes work from before the body starts until after it ends.

        Raises:
            CakeError: one of them is gone.
        """
        self._start()
        self._tell("go")
        try:
            yield
        finally:
            self._tell("rest")

    def _start(self) -> None:
        for command in self._commands[len(self._processes) :]:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._ends.callback(_end, process)
            self._processes.append(process)

    def _tell(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(f"{word}\n")
                process.stdin.flush()
            except OSError as error:
                raise _gone() from error
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != word:
                raise _gone()


def demand(share: float) -> tuple[int, float]:
    """Returns how many processes per core, and which part of a core for each, leave that share."""
    if share >= 1:
        return 0, 0.0
    each = max(1, math.ceil(1 / share - 1 - 1e-9))
    return each, (1 - share) / each


def usable_cores() -> list[int]:
    """Returns the numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process: it ends by itself when its input does, or is killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # it was gone before
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _gone() -> CakeError:
    return CakeError("A process of the competing load has ended; see its message above.")
