"""Every budget of the library, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

from cake_hf.util.environment import a_count, limit_variable, some_seconds, value_from
from cake_hf.util.sizes import parse_bytes

STAGED_PER_THREAD = 3
"""Maximum number of staged chunks per loader thread, in memory beside the KV; memory left to late reads is not counted."""

ENGINE_BYTES = 4 * 2**30
ENGINE_SHARE = 0.25
"""Maximum memory of a continuous-batching engine on a CPU, and of the available memory, if its configuration sets none."""

MIN_CHUNK_SIZE = 16
"""Below this, a chunk's fixed costs (one file, one forward) dwarf the cost of its tokens."""


MOST_SECONDS = 10.0**9
"""The longest time accepted: some systems' clocks and waits cannot represent more."""

MOST = {"loader_threads": 4096}
MOST_BYTES = 2**62

MAY_BE_ZERO = frozenset({"device_decode_bytes"})

MOST_SHOWN = 40
"""Characters of a value that a message quotes."""


@dataclass(frozen=True)
class Limits:
    """The threads, bytes and seconds that a cache may use.

    Attributes:
        loader_threads: threads that read chunks while a prompt is being restored (they end with the restore).
        read_timeout: seconds that reading one chunk may take before the chunk is computed instead.
        lookup_timeout: seconds that matching the prefix may take before all chunks count as missing; also the seconds that
            opening the store may take before the cache continues without it.
        save_queue_bytes: bytes of chunks that may wait to be written; beyond that, saving is skipped and counted. For a model
            on a GPU this is page-locked memory, which torch allocates in powers of two and keeps for the next prompt.
        tier_queue_bytes: bytes of chunks that tiers may hold for copies and delayed writes; beyond that, these are skipped and
            counted. Applies to tiers that the cache opens itself.
        device_decode_bytes: bytes of a GPU's memory for chunks of the codec "lossless" while a prompt is restored: they cross
            encoded, and are decoded there. 0, the default, or less than a chunk has all decoded on the host.
        exit_flush_seconds: how long leaving the interpreter, or `close()`, waits for queued chunks to become durable. The time
            covers everything there is to wait for; when the interpreter exits, all caches of the process share it.

    Raises:
        ValueError: a value is not a number, not positive, or too large; the message names the field and the right form.
    """

    loader_threads: int = 2
    read_timeout: float = 10.0
    lookup_timeout: float = 10.0
    save_queue_bytes: int = 2**30
    tier_queue_bytes: int = 256 * 2**20
    device_decode_bytes: int = 0
    exit_flush_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))

    @classmethod
    def from_environment(cls, **chosen: Any) -> Limits:
        """Returns limits; those not given here come from their `CAKE_HF_*` variables (see docs/environment.md) or are the
        defaults.

        A `CakeCache` made without `limits` uses `Limits.from_environment()`.

        Raises:
            ValueError: a variable cannot be used, or a number is not positive.
        """
        asked = {name: parse for name, parse in _PARSERS.items() if name not in chosen}
        found: dict[str, Any] = {
            name: value_from(limit_variable(name), partial(_parsed, name, parse)) for name, parse in asked.items()
        }
        return cls(**chosen, **{name: value for name, value in found.items() if value is not None})


_PARSERS: dict[str, Callable[[str], float]] = {
    "loader_threads": a_count,
    "read_timeout": some_seconds,
    "lookup_timeout": some_seconds,
    "save_queue_bytes": parse_bytes,
    "tier_queue_bytes": parse_bytes,
    "device_decode_bytes": parse_bytes,
    "exit_flush_seconds": some_seconds,
}


def _checked(name: str, value: Any) -> float:
    """Returns the value of a field as a plain number.

    Raises:
        ValueError: the value is not a valid budget; the message names the field and the right form.
    """
    is_time = _PARSERS[name] is some_seconds
    most = MOST_SECONDS if is_time else MOST.get(name, MOST_BYTES)
    form = (
        "a number of seconds, such as 2.5" if is_time else f"a whole number, such as {getattr(Limits, name) or 2**29}"
    )
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    may_be_zero = name in MAY_BE_ZERO
    if is_number and not (value > 0 or (may_be_zero and value == 0)):  # so that NaN is refused too
        raise ValueError(f"Limits.{name} must be {'0 or ' if may_be_zero else ''}positive, got {_shown(value)}.")
    if not is_number or not (is_time or isinstance(value, Integral)):
        raise ValueError(f"Limits.{name} must be {form}, got {_shown(value)}.")
    if value > most:
        raise ValueError(f"Limits.{name} must be {form}, and at most {most:,.0f}; got {_shown(value)}.")
    return float(value) if is_time else int(value)


def _parsed(name: str, parse: Callable[[str], float], text: str) -> float:
    return _checked(name, parse(text))


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not print whole numbers with thousands of digits
        return "a number with thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
