"""How large everything is: for a GPU, and for a rehearsal on a CPU that only shows that it runs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.grid.axes import Source
from benchmarks.settings import Settings, shape_named

GPU_SOURCES = ("memory", "disk", "7gbps", "25gbps", "32gbps", "56gbps", "100gbps")


@dataclass(frozen=True)
class Sizes:
    """Of one check.

    Attributes:
        device, shape, dtype: of the large model.
        chunk_size: tokens.
        lengths: of the prompts whose first token is timed, the longest last; decoding takes the longest.
        middle: tokens of the prompt of all other measurements, one of the lengths.
        sources: where chunks come from.
        repeats: rounds.
        decode_steps, new_tokens: as in `Settings`.
        loader_threads: up to so many are compared in loading.
        suffix: tokens after the last loads, where layer-wise arrival is compared.
        families, dtypes, attentions: of the tiny models.
        tiny_chunk: tokens of their chunks.
        exactness: also ask the large model whether restoring is exact.
        copied: bytes of what is copied to see how fast that can be.
        matrix: rows of the matrices that are multiplied.
    """

    device: str = "cuda"
    shape: str = "8b"
    dtype: str = "bfloat16"
    chunk_size: int = 512
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    middle: int = 16384
    sources: tuple[str, ...] = GPU_SOURCES
    repeats: int = 3
    decode_steps: int = 48
    new_tokens: int = 32
    loader_threads: int = 4
    suffix: int = 256
    families: tuple[str, ...] = ("llama", "qwen3", "gemma3", "qwen3_next")
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    attentions: tuple[str, ...] = ("sdpa", "eager", "flash_attention_2")
    tiny_chunk: int = 64
    exactness: bool = True
    copied: int = 2**30
    matrix: int = 8192

    def settings(self, **changes: object) -> Settings:
        """Of a bench for the longest prompt of the large model."""
        of_all: dict[str, object] = {
            "shape": shape_named(self.shape),
            "tokens": self.lengths[-1],
            "suffix_tokens": min(64, self.chunk_size // 2),
            "chunk_size": self.chunk_size,
            "dtype": self.dtype,
            "device": self.device,
            "repeats": self.repeats,
            "new_tokens": self.new_tokens,
            "decode_steps": self.decode_steps,
        }
        return Settings(**{**of_all, **changes})  # type: ignore[arg-type]  # the fields are of many types

    def stores(self) -> tuple[Source, ...]:
        """The sources, parsed."""
        return tuple(map(Source.parse, self.sources))


ON_A_GPU = Sizes()
REHEARSAL = Sizes(
    device="cpu",
    shape="tiny",
    dtype="float32",
    chunk_size=16,
    lengths=(64, 128),
    middle=64,
    sources=("memory", "disk", "1gbps"),
    repeats=1,
    decode_steps=3,
    new_tokens=2,
    loader_threads=2,
    suffix=16,
    dtypes=("float32",),
    attentions=("sdpa",),
    tiny_chunk=16,
    exactness=False,
    copied=2**20,
    matrix=64,
)
