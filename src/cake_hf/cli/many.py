"""Asks about many chunks in several threads, which wait for slow answers at the same time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from typing import Generic, TypeVar

from cake_hf.util.forks import refusal

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8
MOST_AT_ONCE = 32
"""Items that a thread takes at once: handing over each item by itself costs as much as reading a header from memory."""

AHEAD = 2
"""Answers may be ahead of the caller by this many times what the threads are working on."""

WAKE_SECONDS = 0.2
"""A signal that arrives just before a wait does not end it, so no wait is longer than this."""


@dataclass
class _Batch(Generic[T, R]):
    items: Sequence[T]
    answers: list[R] = field(default_factory=list)
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


def each_answer(
    items: Sequence[T], ask: Callable[[T], R], threads: int = THREADS
) -> Generator[tuple[T, R], None, None]:
    """Yields the items with their answers, in the order of the items.

    Closing the iterator early, or interrupting it, waits for nothing: each thread ends when its question is answered, and
    the process does not stay for them. (`contextlib.closing` closes an iterator that an exception leaves.)

    Args:
        items: any.
        ask: called in several threads at once. An error that it raises is raised here, in the item's turn.
        threads: at most; fewer if the system gives no more.
    """
    tasks: SimpleQueue[_Batch[T, R] | None] = SimpleQueue()
    stopped = threading.Event()
    try:
        workers = _started(min(threads, len(items)), lambda: _work(tasks, ask, stopped))
        if workers:
            yield from _in_turn(_batches(items, len(workers)), tasks, AHEAD * len(workers))
        else:
            yield from ((item, ask(item)) for item in items)
    finally:
        stopped.set()
        for _ in range(threads):
            tasks.put(None)
    for worker in workers:
        worker.join()


def _in_turn(
    batches: Iterator[_Batch[T, R]], tasks: SimpleQueue[_Batch[T, R] | None], ahead: int
) -> Iterator[tuple[T, R]]:
    waiting: deque[_Batch[T, R]] = deque()
    while True:
        for batch in islice(batches, ahead - len(waiting)):
            waiting.append(batch)
            tasks.put(batch)
        if not waiting:
            return
        first = waiting.popleft()
        while not first.done.wait(WAKE_SECONDS):
            pass
        yield from zip(first.items, first.answers, strict=False)  # not the items after an error
        if first.error is not None:
            raise first.error


def _batches(items: Sequence[T], threads: int) -> Iterator[_Batch[T, R]]:
    size = max(1, min(MOST_AT_ONCE, len(items) // (AHEAD * threads)))
    return (_Batch(items[begin : begin + size]) for begin in range(0, len(items), size))


def _work(tasks: SimpleQueue[_Batch[T, R] | None], ask: Callable[[T], R], stopped: threading.Event) -> None:
    while (batch := tasks.get()) is not None:
        try:
            for item in batch.items:
                if stopped.is_set():
                    return
                batch.answers.append(ask(item))
        except BaseException as error:
            batch.error = error
        finally:
            batch.done.set()


def _started(count: int, work: Callable[[], None]) -> list[threading.Thread]:
    workers: list[threading.Thread] = []
    for number in range(count):
        worker = threading.Thread(target=work, name=f"cake-look-{number}", daemon=True)
        if refusal(worker) is not None:
            break
        workers.append(worker)
    return workers
