"""A process that keeps a part of a processor core, or of a GPU, busy, as another user of the machine would.

Run as a script by `competition`, with `python -I`, so that it starts without this package:

    competitor.py DEVICE PART [CORE]

With a core it stays on that core: two of them on one core, and none on the other, would be another competition. It reads "go"
and "rest" from its input, a line each, and repeats the word once it has obeyed. It ends when its input does.
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
GPU_QUANTUM = 0.01
"""Seconds of work given to a GPU at a time: it is shared in slices of some milliseconds, so less would hardly show."""
CALIBRATION_ROUNDS = 20

Work = Callable[[], float]


def cpu_work() -> float:
    """Keeps busy until this thread has had QUANTUM seconds of a core; returns what it had."""
    begin = time.thread_time()
    while (used := time.thread_time() - begin) < QUANTUM:
        sum(range(200))
    return used


def gpu_work(device: str) -> Work:
    """Returns some matrix products, and how long they take on an idle GPU (measured now)."""
    import torch

    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(matrix)

    def multiply(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            torch.mm(matrix, matrix, out=product)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    return in_bursts(multiply)


def in_bursts(multiply: Callable[[int], float]) -> Work:
    """Returns work of about GPU_QUANTUM seconds.

    Args:
        multiply: does that many products, and returns the seconds.
    """
    multiply(1)
    each = multiply(CALIBRATION_ROUNDS) / CALIBRATION_ROUNDS
    count = max(1, round(GPU_QUANTUM / each))

    def work() -> float:
        multiply(count)
        return count * each

    return work


def compete(work: Work, part: float, running: threading.Event) -> None:
    """Takes that part of the time from others, as long as `running` is set."""
    due = time.perf_counter()
    while running.is_set():
        due = max(due, time.perf_counter() - MOST_DEBT) + work() / part
        time.sleep(max(0.0, due - time.perf_counter()))


def listen(running: threading.Event, changed: threading.Event) -> None:
    """Obeys the words on its input."""
    for line in sys.stdin:
        (running.set if line.strip() == "go" else running.clear)()
        changed.set()
    os._exit(0)


def main(device: str, part: float, core: int | None = None) -> None:
    """Works and rests as told, until the input ends."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
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
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:]))
