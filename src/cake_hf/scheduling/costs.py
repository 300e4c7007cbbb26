"""The cost model: seconds to compute and to load a chunk.

It is Cake's model (Jin et al., ICML 2025): chunk i costs `a + b * i` seconds to compute, since later chunks attend to more
tokens, and loading costs the same for every chunk. `learning` estimates these costs from measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_SECONDS = 1e6
MAX_BYTES = 2**50
MAX_INDEX = 2**40
"""Numbers beyond these limits are not valid measurements. The limits also keep every prediction finite."""


@dataclass(frozen=True)
class ComputeCost:
    """Seconds to compute chunk i: `base + slope * i`.

    Attributes:
        base: a, seconds for the first chunk of a prompt.
        slope: b, seconds that each chunk costs more than the one before it.

    Raises:
        ValueError: a number is negative, NaN or absurdly large.
    """

    base: float
    slope: float = 0.0

    def __post_init__(self) -> None:
        check("compute base", self.base, 0.0, MAX_SECONDS, "seconds")
        check("compute slope", self.slope, 0.0, MAX_SECONDS, "seconds")

    def seconds(self, index: int) -> float:
        """Returns the seconds to compute chunk `index` on the absolute grid."""
        return self.base + self.slope * index


@dataclass(frozen=True)
class LoadCost:
    """Seconds to load chunks of one size: `latency + chunk_bytes / bandwidth` for a single load.

    With k threads, each load waits `latency` independently and then takes its turn on the shared path of `bandwidth`. In steady
    flow a chunk arrives every `max(D, (latency + D) / k)` seconds, with `D = chunk_bytes / bandwidth`: the asymptotic bound of
    a closed queueing network (Denning and Buzen, ACM Computing Surveys 10(3), 1978), which is attained because nothing here is
    random.

    Attributes:
        latency: seconds of a load during which the path is free for other loads.
        bandwidth: bytes per second of the path, shared by all loads.
        chunk_bytes: bytes of one chunk.
        threads: k, concurrent loads.

    Raises:
        ValueError: a number is out of range, NaN or absurdly large.
    """

    latency: float
    bandwidth: float
    chunk_bytes: float
    threads: int = 1

    def __post_init__(self) -> None:
        check("load latency", self.latency, 0.0, MAX_SECONDS, "seconds")
        check("bandwidth", self.bandwidth, 1.0, MAX_BYTES, "bytes per second")
        check("size of a chunk", self.chunk_bytes, 1.0, MAX_BYTES, "bytes")
        check("number of loader threads", self.threads, 1, 2**20, "threads")

    @property
    def seconds(self) -> float:
        """Seconds of one load that has the path to itself."""
        return self.latency + self._transfer

    @property
    def interval(self) -> float:
        """Seconds between two arrivals while all threads are busy."""
        return max(self._transfer, self.seconds / self.threads)

    def finish(self, count: int) -> float:
        """Returns the seconds until `count` chunks have arrived, if all threads start at 0.

        Successive loads of one thread take `max(k * D, latency + D)` seconds each; the first load of the p-th thread arrives at
        `latency + p * D`.
        """
        if count <= 0:
            return 0.0
        rounds, position = divmod(count - 1, self.threads)
        return rounds * self.threads * self.interval + self.latency + (position + 1) * self._transfer

    @property
    def _transfer(self) -> float:
        return self.chunk_bytes / self.bandwidth


@dataclass(frozen=True)
class Costs:
    """Both halves of the cost model; a half is None while it is not known."""

    compute: ComputeCost | None = None
    load: LoadCost | None = None


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


def is_number(value: object, low: float, high: float) -> bool:
    """Returns whether a value is a number in that range. NaN never is, nor is a bool; integers may have any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def check(name: str, value: float, low: float, high: float, unit: str) -> None:
    """Raises ValueError unless the value is a number in that range."""
    if not is_number(value, low, high):
        raise ValueError(f"The {name} must be between {low:g} and {high:g} {unit}, got {value}.")
