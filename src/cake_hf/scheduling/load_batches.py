"""Loads that were measured together, and what they tell of latency and bandwidth, whether their chunks were encoded or not."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate
from statistics import fmean, median
from typing import NamedTuple

from cake_hf.scheduling.costs import (
    MAX_BYTES,
    MAX_INDEX,
    MAX_RATIO,
    MAX_SECONDS,
    MIN_RATIO,
    Brought,
    CodecCost,
    LoadCost,
)

ROUNDING = 1e-9

WORK = 2 / 3
"""Minimum fraction of a load for which its thread has a processor, if the load waits for nothing."""

WORKING = 1 / 4
"""Minimum fraction of loads that wait for nothing, if the store's path is not what limits them. The others may have waited for
a processor, since a forward may run beside them."""


class Load(NamedTuple):
    """One load: start and end, in seconds of one clock, and what it brought."""

    start: float
    end: float
    brought: Brought

    @property
    def seconds(self) -> float:
        """Seconds without those of decoding."""
        return self.end - self.start - self.brought.decoding

    @property
    def is_possible(self) -> bool:
        """Whether this can have been measured."""
        nbytes, raw_bytes, decoding, _, working = self.brought
        whole = isinstance(nbytes, int) and isinstance(raw_bytes, int)
        in_range = whole and min(nbytes, raw_bytes) >= 1 and max(nbytes, raw_bytes) <= MAX_BYTES
        return in_range and 0 <= decoding <= self.end - self.start <= MAX_SECONDS and 0 <= working <= MAX_SECONDS


@dataclass(frozen=True)
class LoadBatch:
    """Loads that were measured together.

    Attributes:
        chunk_bytes: bytes that came from the store for a chunk, on average.
        count: number of loads.
        busy: seconds during which anything was being loaded or decoded.
        shortest: seconds of the fastest load, without its decoding.
        threads: number of loads that ran concurrently.
        shortest_bytes: bytes that the fastest load brought.
        decoding: seconds of decoding per load, on average.
        usual: seconds of a load, without its decoding, on average.
        copying: see `LoadCost`.
    """

    chunk_bytes: int
    count: int
    busy: float
    shortest: float
    threads: int
    shortest_bytes: int
    decoding: float
    usual: float
    copying: float = 0.0

    def cost(self, chunk_bytes: float | None = None, decoding: float = 0.0) -> LoadCost:
        """Returns the model that reproduces these numbers: `finish(count) = busy` and, in steady flow, `seconds = shortest`.

        Args:
            chunk_bytes: of the chunks to be loaded; None for such as these, with their decoding.
            decoding: seconds of decoding of one of these.
        """
        if chunk_bytes is None:
            chunk_bytes, decoding = self.chunk_bytes, self.decoding
        per_byte = self._transfer() / self.chunk_bytes
        latency = self.shortest - per_byte * self.shortest_bytes
        return load_cost(latency, per_byte, chunk_bytes, self.threads, decoding, self.copying)

    def late_by(self, factor: float) -> LoadBatch:
        """Returns the same loads, if the store had taken that many times as long."""
        return replace(self, busy=self.busy * factor, shortest=self.shortest * factor, usual=self.usual * factor)

    @property
    def rounds(self) -> int:
        """Loads, one after the other, of the thread that has most of them."""
        return -(-self.count // self.threads)

    @property
    def is_valid(self) -> bool:
        """Whether these numbers are possible."""
        numbers = self.chunk_bytes, self.count, self.threads, self.shortest_bytes
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            return False
        sizes = 1 <= self.chunk_bytes <= MAX_BYTES and 1 <= self.shortest_bytes <= MAX_BYTES
        counts = 1 <= self.threads <= self.count <= MAX_INDEX
        seconds = 0.0 < self.shortest <= self.usual <= self.busy <= MAX_SECONDS
        work = 0.0 <= self.decoding <= self.busy - self.shortest and 0.0 <= self.copying <= MAX_SECONDS
        return sizes and counts and seconds and work

    def _transfer(self) -> float:
        """Returns the seconds t for which an average load takes the path.

        If the path is the bottleneck, n loads take `m + (n - 1) * t` seconds, where m is the time of a single load. (The
        fastest one counts with its own size, where forms differ.) One thread decodes them one after the other, too. Otherwise
        each round of k loads takes m, and the last round `m + p * t`, where p is the number of its loads after the first; p = 0
        says nothing about t except that it is at most m / k. It is also at most the part of m that is not decoding, unless that
        does not explain the time that all loads took, and never more than that part of a usual load. The part of m beyond t and
        decoding is latency.
        """
        most = self.shortest * self.chunk_bytes / self.shortest_bytes
        if self.count == 1:
            return most
        alone = self.shortest + self.decoding
        others = max(1, self.count * self.chunk_bytes - self.shortest_bytes) / self.chunk_bytes
        if self.threads == 1:
            return max(0.0, self.busy - self.shortest - self.count * self.decoding) / others
        transfer = (self.busy - alone) / others
        rounds, beyond = divmod(self.count - 1, self.threads)
        if transfer * self.threads >= alone:
            explained = rounds * max(self.threads * most, alone) + alone + beyond * most
            return most if most < transfer and explained >= self.busy * (1 - ROUNDING) else min(transfer, self.usual)
        most = min(alone / self.threads, most)
        return min(max((self.busy - (rounds + 1) * alone) / beyond, 0.0), most) if beyond else most


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the seconds during which at least one span (start, end) was under way: the length of their union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """Returns the maximum number of spans (start, end) that overlap; a span does not overlap one that starts where it ends."""
    under_way = most = 0
    for _, change in sorted(
        [(at, change) for start, end in spans if end > start for at, change in ((start, 1), (end, -1))]
    ):
        under_way += change
        most = max(most, under_way)
    return most


def possible_loads(spans: Iterable[tuple[float, float]], brought: Iterable[Brought]) -> list[Load]:
    """Returns the loads with these times, without impossible ones."""
    loads = [Load(start, end, one) for (start, end), one in zip(spans, brought, strict=True)]
    return [load for load in loads if load.is_possible]


def batch_of(loads: Sequence[Load]) -> LoadBatch | None:
    """Returns what loads have in common; None if there are none, or if the result is not possible."""
    if not loads:
        return None
    spans = [(load.start, load.end) for load in loads]
    seconds = [load.seconds for load in loads]
    fastest = loads[seconds.index(min(seconds))]
    busy = busy_seconds(spans)
    batch = LoadBatch(
        max(1, round(fmean(load.brought.nbytes for load in loads))),
        len(loads),
        busy,
        min(seconds),
        most_at_once(spans),
        fastest.brought.nbytes,
        min(fmean(load.brought.decoding for load in loads), max(0.0, busy - min(seconds))),
        min(max(fmean(seconds), min(seconds)), busy),
        _copying(loads),
    )
    return batch if batch.is_valid else None


def _copying(loads: Sequence[Load]) -> float:
    """Returns `LoadCost.copying`, the median of those loads that wait for nothing."""
    worked = [
        max(0.0, load.brought.working - load.brought.decoding) / load.brought.nbytes
        for load in loads
        if load.brought.working >= WORK * (load.end - load.start) > 0
    ]
    return median(worked) if len(worked) >= WORKING * len(loads) else 0.0


def codec_of(loads: Sequence[Load]) -> CodecCost | None:
    """Returns how the encoded ones among loads differ from raw ones; None if none came whole.

    The speed is the median: a thread that had to wait for a processor while it decoded says nothing of decoding.
    """
    encoded = [load.brought for load in loads if load.brought.decoding > 0 and not load.brought.is_rounded]
    if not encoded:
        return None
    ratio = sum(one.nbytes for one in encoded) / sum(one.raw_bytes for one in encoded)
    per_byte = median(one.decoding / one.raw_bytes for one in encoded)
    speed = 1 / per_byte if per_byte * MAX_BYTES > 1 else float(MAX_BYTES)
    return CodecCost(min(max(ratio, MIN_RATIO), MAX_RATIO), max(1.0, speed))


def fit_load(batches: Sequence[LoadBatch], chunk_bytes: float | None) -> LoadCost | None:
    """Returns the cost of the last batch.

    If it has too few loads to separate latency from bandwidth: the cost of the median batch, scaled to the last batch's level.

    Args:
        batches: from the oldest to the last.
        chunk_bytes: of raw chunks; None for chunks as in the last batch.
    """
    if not batches:
        return None
    last = batches[-1]
    if last.count > last.threads:
        return last.cost(chunk_bytes)
    size, decoding = (last.chunk_bytes, last.decoding) if chunk_bytes is None else (chunk_bytes, 0.0)
    costs = sorted(((batch, batch.cost(size, decoding)) for batch in batches), key=lambda pair: pair[1].interval)
    reached = list(accumulate(batch.count for batch, _ in costs))
    usual, cost = costs[bisect_left(reached, reached[-1] / 2)]
    # Decoding is as it was; what is left of the time is the store's.
    decodes = last.rounds * last.decoding
    due = usual.cost(last.chunk_bytes, last.decoding).finish(last.count) - decodes
    level = level_of(last.busy - decodes, due)
    return load_cost(cost.latency * level, level / cost.bandwidth, size, cost.threads, decoding, last.copying)


def level_of(seconds: float, due: float) -> float:
    """Returns how many times as long as due something took, within bounds; 1 if that cannot be told."""
    if not seconds > 0 or not due > 0:
        return 1.0
    return min(max(seconds / due, 1 / MAX_SECONDS), MAX_SECONDS)


def load_cost(
    latency: float, per_byte: float, chunk_bytes: float, threads: int, decoding: float = 0.0, copying: float = 0.0
) -> LoadCost:
    """Returns a cost with all numbers within bounds."""
    bandwidth = 1 / per_byte if per_byte * MAX_BYTES > 1 else float(MAX_BYTES)
    latency = min(max(latency, 0.0), MAX_SECONDS)
    return LoadCost(latency, max(1.0, bandwidth), chunk_bytes, threads, decoding, copying)


def batch_row(batch: LoadBatch) -> list[float]:
    """Returns a batch as plain numbers."""
    return list(astuple(batch))


def batch_from(row: list[float]) -> LoadBatch:
    """Returns the batch of such numbers. Rows of five are from before the codec: chunks were raw, or taken for raw.

    Raises:
        ValueError: there is no such batch, or these are not plain numbers.
        TypeError: these are not as many.
    """
    if not all(type(number) in (int, float) for number in row):
        raise ValueError("not a row of numbers")
    batch = LoadBatch(*(row if len(row) != 5 else [*row, row[0], 0.0, row[2]]))  # type: ignore[arg-type]  # checked next
    if not batch.is_valid:
        raise ValueError("not a batch of loads")
    return batch
