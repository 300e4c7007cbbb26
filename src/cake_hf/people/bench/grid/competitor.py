"""A process that keeps a part of a processor core, or of a GPU, busy: what another user of the machine would do.

Run as a script by `competition`, with `python -I`, so that it starts without this package:

    competitor.py DEVICE PART

It reads "go" and "rest" from its input, a line each, and repeats the word once it has obeyed. When its input ends, so does it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

QUANTUM = 0.002
"""Seconds of work between two looks at the clock."""
MOST_DEBT = 0.05
"""Seconds of work that may be caught up on after others had the device; more would make bursts of it."""
MATRIX = 4096
CALIBRATION_ROUNDS = 20

Work = Callable[[], float]


def cpu_work() -> float:
    """Be busy until this thread has had QUANTUM seconds of a core; returns what it had."""
    begin = time.thread_time()
    while (used := time.thread_time() - begin) < QUANTUM:
        sum(range(200))
    return used


def gpu_work(device: str) -> Work:
    """A matrix product, and how long it takes when nobody else wants the GPU (measured now)."""
    import torch

    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)

    def multiply() -> None:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize(device)

    multiply()
    begin = time.perf_counter()
    for _ in range(CALIBRATION_ROUNDS):
        multiply()
    seconds = (time.perf_counter() - begin) / CALIBRATION_ROUNDS

    def work() -> float:
        multiply()
        return seconds

    return work


def compete(work: Work, part: float, running: threading.Event) -> None:
    """Take that part of the time from others, as long as `running` is set."""
    due = time.perf_counter()
    while running.is_set():
        due = max(due, time.perf_counter() - MOST_DEBT) + work() / part
        time.sleep(max(0.0, due - time.perf_counter()))


def listen(running: threading.Event, changed: threading.Event) -> None:
    """Obey what comes in."""
    for line in sys.stdin:
        (running.set if line.strip() == "go" else running.clear)()
        changed.set()
    os._exit(0)


def main(device: str, part: float) -> None:
    """Work and rest as told, until the input ends."""
    work = gpu_work(device) if device.startswith("cuda") else cpu_work
    running, changed = threading.Event(), threading.Event()
    threading.Thread(target=listen, args=(running, changed), daemon=True).start()
    while changed.wait():
        changed.clear()
        if running.is_set():
            work()
            print("go", flush=True)
            compete(work, part, running)
        else:
            print("rest", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
