"""The settings of a bench run, in numbers: the model's shape, the prompt, the device, and how often each arm is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from cake_hf.limits import Limits

READ_TIMEOUT = 600.0
"""Seconds. A throttled read is slow on purpose and must not be given up for that."""


class Dtype(StrEnum):
    """The dtype of the weights, and so of the KV."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


@dataclass(frozen=True)
class Shape:
    """Size of a Llama-like model with random weights.

    Attributes:
        hidden, layers, heads, kv_heads, intermediate, vocabulary: as in the model's config; `heads` divides `hidden`.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


DEFAULT_SHAPE = Shape(hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1536, vocabulary=4096)
"""Small enough for two processor cores. At 8K tokens a late chunk costs about four times an early one, as with large models
at long context, and a chunk's KV is 4 MiB in bfloat16: much more work to compute than to read from a local disk."""

QUICK_SHAPE = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=256)

SHAPES = {
    "tiny": QUICK_SHAPE,
    "small": DEFAULT_SHAPE,
    "small-mha": replace(DEFAULT_SHAPE, kv_heads=8),
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128_256),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14_336, vocabulary=128_256),
}
"""Shapes by their names on the command line: "1b" and "8b" are those of Llama-3.2-1B (with a head of its own) and
Llama-3.1-8B; "small-mha" has twice the KV of "small" for nearly the same work."""


@dataclass(frozen=True)
class Settings:
    """One bench run.

    Attributes:
        shape: of the model.
        tokens: of the prefix that is restored, a multiple of `chunk_size`.
        suffix_tokens: of the prompt's suffix, which is always computed.
        chunk_size: tokens.
        dtype: torch's name of it.
        device: that computes, as torch names it.
        repeats: rounds; each round times every arm once.
        new_tokens: of the longer generation.
        decode_steps: tokens decoded with each kind of cache.
        load_to_compute: the throttled cells: load-only should take about this many times compute-only.
        stored_files: how many chunks the store holds in which a prompt's chunks are looked up.
        model: folder or name of the user's own model; empty for one with random weights.
        limits: of all caches. The deadline is out of the way; everything else is as a cache has it here.
    """

    shape: Shape = DEFAULT_SHAPE
    tokens: int = 8192
    suffix_tokens: int = 64
    chunk_size: int = 512
    dtype: str = "bfloat16"
    device: str = "cpu"
    repeats: int = 5
    new_tokens: int = 32
    decode_steps: int = 48
    load_to_compute: tuple[float, ...] = (0.5, 1.0, 2.0)
    stored_files: int = 100_000
    model: str = ""
    limits: Limits = field(default_factory=lambda: Limits.from_environment(read_timeout=READ_TIMEOUT))

    @property
    def chunks(self) -> int:
        """Full chunks of the prefix."""
        return self.tokens // self.chunk_size

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values; for a model in a folder, only that folder's name."""
        model = PurePath(self.model)
        return {**asdict(self), "model": model.name if len(model.parts) > 2 or model.is_absolute() else self.model}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Returns the settings from which `as_dict` made this."""
        typed = {
            "shape": Shape(**values["shape"]),
            "limits": Limits(**values["limits"]),
            "load_to_compute": tuple(values["load_to_compute"]),
        }
        return cls(**{**values, **typed})


def choose(
    *,
    quick: bool,
    repeats: int | None,
    tokens: int | None,
    chunk_size: int | None,
    dtype: str,
    device: str = "cpu",
    shape: str | None = None,
) -> Settings:
    """Returns settings from the command line's options; None takes the default, or the quick run's value.

    Raises:
        ValueError: the prefix has fewer than two chunks, nothing is repeated, or there is no such shape.
    """
    size = chunk_size or (64 if quick else 512)
    wanted = tokens or (512 if quick else 8192)
    rounds = (2 if quick else 5) if repeats is None else repeats
    usual = "tiny" if quick else "small" if device == "cpu" else "1b"
    if wanted < 2 * size:
        raise ValueError(f"{wanted} tokens are less than two chunks of {size}; raise --tokens or lower --chunk-size.")
    if rounds < 1:
        raise ValueError("--repeats must be at least 1.")
    return Settings(
        shape=shape_named(shape or usual),
        tokens=wanted // size * size,
        suffix_tokens=min(64, size // 2),
        chunk_size=size,
        dtype=dtype,
        device=device,
        repeats=rounds,
        new_tokens=8 if quick else 32,
        decode_steps=8 if quick else 48,
        stored_files=2_000 if quick else 100_000,
    )


def shape_named(name: str) -> Shape:
    """Returns one of `SHAPES`.

    Raises:
        ValueError: there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"There is no model shape {name!r}; choose from {', '.join(SHAPES)}.")
    return SHAPES[name]
