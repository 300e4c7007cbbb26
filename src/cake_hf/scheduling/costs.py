"""The cost model: seconds to compute and to load a chunk, and which form of a chunk loads sooner.

It is Cake's model (Jin et al., ICML 2025): chunk i costs `a + b * i` seconds to compute, since later chunks attend to more
tokens, and loading costs the same for every chunk. Encoded chunks take less of the path, and decoding takes a thread's time.
`learning` estimates these costs from measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

MAX_SECONDS = 1e6
MAX_BYTES = 2**50
MAX_INDEX = 2**40
MIN_RATIO, MAX_RATIO = 2.0**-20, 2.0**20
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

    def each(self, indices: Iterable[int]) -> dict[int, float]:
        """Returns `seconds` of each of these chunks."""
        return {index: self.seconds(index) for index in indices}


@dataclass(frozen=True)
class LoadCost:
    """Seconds to load chunks of one size: `latency + chunk_bytes / bandwidth + decoding` for a single load.

    With k threads, each load waits `latency` independently, takes its turn on the shared path of `bandwidth`, and is decoded
    while others have the path. In steady flow a chunk arrives every `max(t, (latency + t + decoding) / k)` seconds, with
    `t = chunk_bytes / bandwidth`: the asymptotic bound of a closed queueing network (Denning and Buzen, ACM Computing Surveys
    10(3), 1978), which is attained because nothing here is random.

    Attributes:
        latency: seconds of a load during which the path is free for other loads.
        bandwidth: bytes per second of the path, shared by all loads.
        chunk_bytes: bytes of one chunk on the path: as it is stored.
        threads: k, concurrent loads.
        decoding: seconds in which a thread decodes a chunk; 0 if chunks are raw.
        copying: seconds for which a thread works on a stored byte, without decoding, if loads hardly wait for anything, as from
            the page cache; 0 if they do.

    Raises:
        ValueError: a number is out of range, NaN or absurdly large.
    """

    latency: float
    bandwidth: float
    chunk_bytes: float
    threads: int = 1
    decoding: float = 0.0
    copying: float = 0.0

    def __post_init__(self) -> None:
        check("load latency", self.latency, 0.0, MAX_SECONDS, "seconds")
        check("bandwidth", self.bandwidth, 1.0, MAX_BYTES, "bytes per second")
        check("size of a chunk", self.chunk_bytes, 1.0, MAX_BYTES, "bytes")
        check("number of loader threads", self.threads, 1, 2**20, "threads")
        check("time of decoding", self.decoding, 0.0, MAX_SECONDS, "seconds")
        check("time of copying", self.copying, 0.0, MAX_SECONDS, "seconds per byte")

    @property
    def seconds(self) -> float:
        """Seconds of one load that has the path to itself."""
        return self.latency + self._transfer + self.decoding

    @property
    def interval(self) -> float:
        """Seconds between two arrivals while all threads are busy."""
        return max(self._transfer, self.seconds / self.threads)

    def finish(self, count: int) -> float:
        """Returns the seconds until `count` chunks have arrived, if all threads start at 0.

        Successive loads of one thread take `max(k * t, latency + t + decoding)` seconds each; the first load of the p-th thread
        arrives at `latency + p * t + decoding`.
        """
        if count <= 0:
            return 0.0
        rounds, position = divmod(count - 1, self.threads)
        free = self.latency + self.decoding  # seconds of a load in which others may have the path
        return rounds * self.threads * self.interval + free + (position + 1) * self._transfer

    @property
    def _transfer(self) -> float:
        return self.chunk_bytes / self.bandwidth


class Brought(NamedTuple):
    """The bytes that a load brought, and the time that decoding took.

    Attributes:
        nbytes: bytes that came from the store.
        raw_bytes: bytes that would have come if the chunk were raw.
        decoding: seconds of the load in which its thread decoded.
        is_rounded: whether only the bases of an encoded chunk came, so that its KV is not exact.
        working: seconds of the load for which its thread had a processor, decoding included.
    """

    nbytes: int
    raw_bytes: int
    decoding: float = 0.0
    is_rounded: bool = False
    working: float = 0.0


@dataclass(frozen=True)
class CodecCost:
    """How encoded chunks differ from raw ones.

    Attributes:
        ratio: r, bytes of an encoded chunk over those of a raw one.
        speed: D, bytes of raw chunks that one thread decodes per second.

    Raises:
        ValueError: a number is out of range, NaN or absurdly large.
    """

    ratio: float
    speed: float

    def __post_init__(self) -> None:
        check("size of encoded chunks", self.ratio, MIN_RATIO, MAX_RATIO, "of the raw ones")
        check("speed of decoding", self.speed, 1.0, MAX_BYTES, "bytes per second")

    def load(self, raw: LoadCost) -> LoadCost:
        """Returns what loading costs if the chunks are encoded: r*S bytes and S/D seconds of decoding for a raw chunk of S.

        Args:
            raw: what loading them raw costs.
        """
        seconds = min(raw.chunk_bytes / self.speed, MAX_SECONDS)
        return replace(raw, chunk_bytes=max(1.0, self.ratio * raw.chunk_bytes), decoding=seconds)

    def raw(self, load: LoadCost) -> LoadCost:
        """Returns what loading costs if all chunks are raw.

        Args:
            load: what loading costs now, of encoded chunks or of both forms, on average: of a share w of encoded ones, decoding
                takes w*S/D seconds, and chunks have `S - (1 - r)*w*S` bytes.
        """
        nbytes = load.chunk_bytes + (1 - self.ratio) * load.decoding * self.speed
        return replace(load, chunk_bytes=min(max(nbytes, 1.0), MAX_BYTES), decoding=0.0)

    def share(self, load: LoadCost) -> float:
        """Returns the share w of encoded chunks among those of `load`."""
        return load.decoding * self.speed / self.raw(load).chunk_bytes


@dataclass(frozen=True)
class Costs:
    """Both halves of the cost model, and what is known of encoded chunks; None while it is not known."""

    compute: ComputeCost | None = None
    load: LoadCost | None = None
    codec: CodecCost | None = None

    @property
    def come_encoded(self) -> bool:
        """Whether most chunks are expected to be encoded."""
        return self.load is not None and self.codec is not None and self.codec.share(self.load) > 1 / 2


def is_number(value: object, low: float, high: float) -> bool:
    """Returns whether a value is a number in that range. NaN never is, nor is a bool; integers may have any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def check(name: str, value: float, low: float, high: float, unit: str) -> None:
    """Raises ValueError unless the value is a number in that range."""
    if not is_number(value, low, high):
        raise ValueError(f"The {name} must be between {low:g} and {high:g} {unit}, got {value}.")


GIGA = 1e9

RAW = CodecCost(1.0, float(MAX_BYTES))
"""Chunks as they are."""

TYPICAL = {
    "lossless": CodecCost(0.70, 5.0 * GIGA),
    "near": CodecCost(0.51, 6.0 * GIGA),
    "int8": CodecCost(0.52, 5.5 * GIGA),
    "int4": CodecCost(0.31, 5.0 * GIGA),
}
"""What codecs take for bfloat16 KV where nothing was measured: sizes of real KV, and one thread of an x86 CPU with AVX2."""


BASE_SHARE = 17 / 32
"""Bytes of a base over those of its piece, at most as a rule: a byte of 2 per number, and 1/32 for windows and escapes."""


CLEARLY_LESS = 0.9
"""Fraction of the work on raw chunks that loading encoded ones may take, where loads are work and nothing else."""


def levels_of(codec: CodecCost | None) -> tuple[CodecCost, CodecCost]:
    """Returns what a chunk of the lossless codec takes whole, and its bases alone; `codec` is the former as measured."""
    whole = codec or TYPICAL["lossless"]
    return whole, CodecCost(min(BASE_SHARE, whole.ratio), whole.speed)


def encoding_pays(costs: Costs) -> bool:
    """Returns whether encoded chunks load no slower than raw ones; True while that is not known.

    Where loads wait for a path, a load of S raw bytes with r*S encoded ones, latency q, bandwidth B, decode speed D and k
    threads takes, in steady flow, `max(r*S/B, (q + r*S/B + S/D) / k)`, and a raw one `max(S/B, (q + S/B) / k)`. So it never
    pays where `k*D < B`: then `S/D > k*S/B`, and an encoded load takes longer than `q/k + S/B`, which is no less than what a
    raw one takes.

    Where they wait for nothing, no path is seen and B cannot be known. A thread then works for `c*r*S + S/D` seconds on an
    encoded load and for `c*S` on a raw one, c being `LoadCost.copying`. Encoding pays if that is clearly less: work that is
    not proportional to the bytes (page faults of the KV buffers above all) makes c too high as measured by encoded loads.

    Args:
        costs: the costs of raw chunks.
    """
    if costs.load is None or costs.codec is None:
        return True
    if (copying := costs.load.copying) > 0:
        return costs.codec.ratio * copying + 1 / costs.codec.speed <= CLEARLY_LESS * copying
    return costs.codec.load(costs.load).interval <= costs.load.interval


def finest(loads: Sequence[LoadCost], left: int, seconds: float) -> int | None:
    """Returns the first of several forms in which the remaining chunks arrive in time; None if there is none.

    That is CacheGen's adaptation (Liu et al., SIGCOMM 2024): of the forms with `left * interval <= seconds`, the finest.

    Args:
        loads: what loading costs now in each form, the finest first.
        left: chunks that are not there.
        seconds: until they have to be.
    """
    return next((form for form, load in enumerate(loads) if left * load.interval <= seconds), None)
