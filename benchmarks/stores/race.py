"""Times a store against its client, in turns: the same bytes, with the same number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from benchmarks.figures import Figure, Goal, Result
from benchmarks.stores.values import StoreSettings, Values
from benchmarks.timing import Sample, interleave
from cake_hf.errors import CakeError
from cake_hf.stores.base import Store
from cake_hf.util.sizes import bytes_text

NEARLY_RAW = Goal(0.8, at_most=False)
GIGA = 10**9

Reader = Callable[[int], object]
"""Reads the chunk of that number. Called by several threads."""


@dataclass(frozen=True)
class Contender:
    """A store, and its client's raw speed.

    Attributes:
        title: for people.
        store: with all chunks in it.
        raw: ways to read a chunk without the store, by name. The store is compared with the fastest of them.
    """

    title: str
    store: Store
    raw: Mapping[str, Reader] = field(default_factory=dict)


def race(contender: Contender, values: Values, settings: StoreSettings) -> Result:
    """Times the store and the raw ways, in turns, by one thread and by several.

    Raises:
        WrongBytes: a read did not return what was written.
        CakeError: the store failed.
    """
    figures: dict[str, Figure] = {}
    for threads in sorted({1, settings.threads}):
        ways: dict[str, Reader] = {**contender.raw, "store": partial(read, contender.store, values)}
        arms = {name: partial(_timed, name, reader, values, threads) for name, reader in ways.items()}
        for arm in arms.values():
            arm()  # Connections are made, caches filled.
        samples = {name: Sample(tuple(found)) for name, found in interleave(arms, settings.repeats).items()}
        figures |= _figures(samples, values.total, threads)
    return Result(f"{contender.title}: {values.count} chunks of {bytes_text(values.nbytes)}", figures)


def _figures(samples: dict[str, Sample], nbytes: int, threads: int) -> dict[str, Figure]:
    label = "1 thread: " if threads == 1 else f"{threads} threads: "
    figures = {
        f"{name.replace(' ', '_')}_{threads}": Figure.of(
            label + name, Sample(tuple(nbytes / seconds / GIGA for seconds in sample.values)), "GB/s"
        )
        for name, sample in samples.items()
    }
    store = samples.pop("store")
    fastest = min(samples.values(), key=lambda sample: sample.median)
    figures[f"share_{threads}"] = Figure.ratio(f"{label}share of the fastest", fastest, store, NEARLY_RAW)
    return figures


def read(store: Store, values: Values, number: int) -> None:
    """Reads a chunk from a store into a cache's buffers.

    Raises:
        CakeError: it is not there, or cannot be read.
    """
    if store.read_into(values.keys[number], values.parts[number]) is None:
        raise CakeError(f"{store!r} has lost a chunk; give it more memory.")


def _timed(name: str, reader: Reader, values: Values, count: int) -> float:
    """Returns the seconds until that many threads have read all chunks."""
    values.clear()
    left = iter(range(values.count))  # `next` on it is one step of the interpreter, so threads may share it
    errors: list[Exception] = []

    def work() -> None:
        try:
            for number in left:
                reader(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if errors:
        raise errors[0]
    if name == "store":
        values.check(name)
    return seconds
