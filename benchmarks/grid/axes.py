"""The axes of the grid: models, lengths, shares of the device, and sources of the chunks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from benchmarks.grid.competition import LEAST_SHARE
from benchmarks.settings import Settings, shape_named
from cake_hf.limits import MIN_CHUNK_SIZE

MAX_TOKENS = 2**21
MAX_REPEATS = 1_000
GBPS = (0.001, 100_000.0)
"""Throttles, in 10^9 bits per second."""
TIMES = (0.01, 100.0)
"""Throttles, relative to computing."""
BITS_PER_BYTE, GIGA = 8, 10**9

_THROTTLE = re.compile(r"(\d+(?:\.\d+)?)(gbps|x)")


@dataclass(frozen=True)
class Source:
    """The source of a cell's chunks.

    Attributes:
        kind: "memory"; "disk" (the local one, from the page cache); or the disk behind a throttle: "gbps", of `amount` in 10^9
            bits per second, or "times", at which loading takes about `amount` times as long as computing does undisturbed.
        amount: 0 if nothing is throttled.
    """

    kind: Literal["memory", "disk", "gbps", "times"]
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parses "memory", "disk", "32gbps" or "0.5x".

        Raises:
            ValueError: it is none of these, or out of range.
        """
        word = text.strip().lower()
        if word == "memory":
            return cls("memory")
        if word == "disk":
            return cls("disk")
        match = _THROTTLE.fullmatch(word)
        if match is None:
            raise ValueError(
                f"There is no store {text!r}; write memory, disk, a bandwidth like 32gbps, or 0.5x of computing."
            )
        amount, is_rate = float(match[1]), match[2] == "gbps"
        low, high = GBPS if is_rate else TIMES
        if not low <= amount <= high:
            raise ValueError(f"The store {text!r} is out of range: {low:g} to {high:g} {'Gbps' if is_rate else 'x'}.")
        return cls("gbps" if is_rate else "times", amount)

    def __str__(self) -> str:
        ending = {"memory": "memory", "disk": "disk", "gbps": f"{self.amount:g}gbps", "times": f"{self.amount:g}x"}
        return ending[self.kind]


@dataclass(frozen=True)
class Axes:
    """One grid: all combinations of the first four are measured.

    Attributes:
        shapes: of models, names from `settings.SHAPES`.
        tokens: lengths of the prefix that is restored; rounded down to full chunks.
        shares: of the device's compute that others leave to us.
        sources: where chunks come from.
        repeats: rounds; in each, every arm of a group is run once.
        chunk_size: tokens.
        dtype, device: of the models, as torch names them.
        peers: also measure the alternatives without us.
        parity: before the grid, check bit for bit that restoring is exact on this device.
        decode: after the grid, compare decoding at the longest length.
        minutes: groups that are not expected to end by then are left out; 0 for no limit.
        throttled: what is behind the throttles. A disk is slower than a fast line; "memory" needs memory for all chunks.

    Raises:
        ValueError: an axis is empty or has values out of range.
    """

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    shares: tuple[float, ...]
    sources: tuple[Source, ...]
    repeats: int = 3
    chunk_size: int = 512
    dtype: str = "bfloat16"
    device: str = "cpu"
    peers: bool = True
    parity: bool = False
    decode: bool = False
    minutes: float = 0.0
    throttled: Literal["disk", "memory"] = "disk"

    def __post_init__(self) -> None:
        for shape in self.shapes:
            shape_named(shape)
        _check("number of rounds", self.repeats, 1, MAX_REPEATS)
        _check("chunk size", self.chunk_size, MIN_CHUNK_SIZE, MAX_TOKENS)
        for tokens in self.tokens:
            _check("length of a prompt, in tokens,", tokens, 2 * self.chunk_size, MAX_TOKENS)
        for share in self.shares:
            _check("share of compute left", share, LEAST_SHARE, 1)
        _check("number of minutes", self.minutes, 0, 10_000)
        for name in ("shapes", "tokens", "shares", "sources"):
            if not getattr(self, name):
                raise ValueError(f"The grid has no {name}; give one at least.")

    @property
    def needs_memory(self) -> bool:
        """Whether some source reads from a copy in memory."""
        if self.throttled == "memory" and any(source.kind in ("gbps", "times") for source in self.sources):
            return True
        return any(source.kind == "memory" for source in self.sources)

    @property
    def lengths(self) -> list[int]:
        """The lengths in full chunks, ascending, each once."""
        return sorted({tokens // self.chunk_size * self.chunk_size for tokens in self.tokens})

    def settings(self, shape: str) -> Settings:
        """Returns the settings of a bench for the longest prompt."""
        return Settings(
            shape=shape_named(shape),
            tokens=self.lengths[-1],
            suffix_tokens=min(64, self.chunk_size // 2),
            chunk_size=self.chunk_size,
            dtype=self.dtype,
            device=self.device,
            repeats=self.repeats,
        )

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        return {**asdict(self), "sources": [str(source) for source in self.sources]}


def with_options(
    preset: Axes,
    *,
    device: str,
    shapes: str | None = None,
    lengths: str | None = None,
    shares: str | None = None,
    stores: str | None = None,
    **others: int | float | str | bool | None,
) -> Axes:
    """Returns a preset with the command line's options in place of its own; None means not given.

    Args:
        preset: to start from.
        device: that computes.
        shapes, lengths, shares, stores: values separated by commas.
        **others: fields of `Axes`.

    Raises:
        ValueError: something cannot be read or is out of range.
    """
    given: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    if shapes is not None:
        given["shapes"] = tuple(_words(shapes))
    if lengths is not None:
        given["tokens"] = tuple(_number(word, int, "--lengths") for word in _words(lengths))
    if shares is not None:
        given["shares"] = tuple(_number(word, float, "--shares") for word in _words(shares))
    if stores is not None:
        given["sources"] = tuple(Source.parse(word) for word in _words(stores))
    return replace(preset, device=device, **given)


def _words(text: str) -> Iterable[str]:
    """Returns each word once, in the given order."""
    return dict.fromkeys(word.strip() for word in text.split(",") if word.strip())


def _number(word: str, kind: type[int] | type[float], option: str) -> int | float:
    try:
        return kind(word)
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas, got {word!r}.") from error


def _check(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # so that NaN is refused, too
        raise ValueError(f"The {what} must be from {low:,} to {high:,}, got {value:,}.")


PRESETS = {
    "quick": Axes(
        shapes=("tiny",),
        tokens=(256, 512),
        shares=(1.0, 0.5),
        sources=(Source("memory"), Source("disk"), Source("times", 1.0)),
        repeats=1,
        chunk_size=64,
        dtype="float32",
        parity=True,
        decode=True,
    ),
    "cpu": Axes(
        shapes=("small", "small-mha"),
        tokens=(2048, 4096, 8192),
        shares=(1.0, 0.5),
        sources=(Source("memory"), Source("disk"), *(Source("times", times) for times in (0.5, 1.0, 2.0))),
    ),
    "gpu": Axes(
        shapes=("8b",),
        tokens=(4096, 8192, 16384, 32768),
        shares=(1.0, 0.5),
        sources=(Source("memory"), Source("disk"), *(Source("gbps", gbps) for gbps in (7, 25, 32, 56, 100))),
        parity=True,
        decode=True,
        minutes=8.0,
    ),
}
"""Presets by their names on the command line. Groups are ordered by share, then by length with the longest first, so that
those left out for lack of time tell least."""
