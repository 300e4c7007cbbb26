"""Every budget of the library, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cake_hf.arithmetic.environment import a_count, limit_variable, some_seconds, value_from
from cake_hf.arithmetic.sizes import parse_bytes

ASIDE_PER_THREAD = 3
"""Chunks per loader thread that may be in memory of their own, beside the KV, at any time; what is left to late reads is
not counted."""

MIN_CHUNK_SIZE = 16
"""Below this a chunk's fixed costs (one file, one forward) dwarf its tokens."""


@dataclass(frozen=True)
class Limits:
    """How many threads, bytes and seconds a cache may take.

    Attributes:
        loader_threads: threads that read chunks while a prompt is being restored (they end with the restore).
        read_timeout: seconds one chunk's read may take before the chunk is computed instead.
        lookup_timeout: seconds the question "which of these chunks do you have?" may take before all count as missing.
        save_queue_bytes: bytes of chunks that may wait to be written; beyond it saving is skipped and counted. Of a model on a
            GPU that is page-locked memory, which torch hands out in powers of two and keeps for the next prompt.
        tier_queue_bytes: bytes of chunks that tiers may hold for copies and writes behind; beyond it these are skipped and
            counted. For tiers that the cache opens itself.
        exit_flush_seconds: how long leaving the interpreter, or `close()`, waits for queued chunks to become durable.

    Raises:
        ValueError: a number is not positive.
    """

    loader_threads: int = 2
    read_timeout: float = 10.0
    lookup_timeout: float = 10.0
    save_queue_bytes: int = 2**30
    tier_queue_bytes: int = 256 * 2**20
    exit_flush_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:  # so that NaN is refused too
                raise ValueError(f"Limits.{name} must be positive, got {getattr(self, name)}.")

    @classmethod
    def from_environment(cls, **chosen: Any) -> Limits:
        """What is not chosen here comes from its `CAKE_HF_*` variable (see docs/environment.md), or else from the defaults.

        A `CakeCache` without `limits` has these.

        Raises:
            ValueError: a variable that is asked for cannot be used, or a number is not positive.
        """
        asked = {name: parse for name, parse in _PARSERS.items() if name not in chosen}
        found: dict[str, Any] = {name: value_from(limit_variable(name), parse) for name, parse in asked.items()}
        return cls(**chosen, **{name: value for name, value in found.items() if value is not None})


_PARSERS: dict[str, Callable[[str], float]] = {
    "loader_threads": a_count,
    "read_timeout": some_seconds,
    "lookup_timeout": some_seconds,
    "save_queue_bytes": parse_bytes,
    "tier_queue_bytes": parse_bytes,
    "exit_flush_seconds": some_seconds,
}
