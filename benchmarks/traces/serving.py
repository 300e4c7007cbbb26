"""What serves a trace on the virtual clock: the paper's cost curves, a line to the store, and the store's size."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulation.command import (
    BITS_PER_BYTE,
    EIGHT,
    GIGA,
    GPU_STEPS,
    KIB,
    SEVEN,
    SEVENTY,
    THIRTEEN,
    Model,
    step_cost,
)
from benchmarks.simulation.simulator import Setting
from benchmarks.traces.requests import BLOCK

MODELS = {model.name: model for model in (SEVEN, THIRTEEN, EIGHT, SEVENTY)}
GIB = 2**30


@dataclass(frozen=True)
class Serving:
    """A model on GPUs, with a store behind a line.

    Attributes:
        model: one of the paper's.
        gpu, gpus: what computes; the cost curve follows from these (see `benchmarks.simulation.command`).
        gbps: of the line, 10^9 bits per second.
        threads: loader threads.

    Raises:
        ValueError: the GPU has no cost curve, or a number is out of range.
    """

    model: Model = SEVEN
    gpu: str = "A100"
    gpus: int = 1
    gbps: float = 32.0
    threads: int = 2

    def __post_init__(self) -> None:
        if self.gpu not in GPU_STEPS:
            raise ValueError(f"There are no step times of a GPU {self.gpu!r}; choose one of {', '.join(GPU_STEPS)}.")
        if self.gpus < 1:
            raise ValueError(f"There must be at least one GPU, got {self.gpus}.")

    @property
    def name(self) -> str:
        """The model and the GPUs, for a table."""
        return f"{self.model.name} on {self.gpu if self.gpus == 1 else f'{self.gpus} x {self.gpu}'}"

    @property
    def block_bytes(self) -> float:
        """Bytes of a block's KV in bfloat16."""
        return BLOCK * self.model.kv_kib * KIB

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the line."""
        return self.gbps * GIGA / BITS_PER_BYTE

    def blocks_in(self, gib: float) -> int:
        """Returns how many blocks fit into so many GiB."""
        return int(gib * GIB / self.block_bytes)

    def step_seconds(self, blocks: int) -> tuple[float, ...]:
        """Returns the seconds to compute each of the first blocks of a prompt."""
        cost = step_cost(self.model, self.gpu, self.gpus)
        return tuple(cost.seconds(index) for index in range(blocks))

    def suffix_seconds(self, blocks: int, tokens: int) -> float:
        """Returns the seconds to compute so many tokens behind the blocks: their share of the next block."""
        return step_cost(self.model, self.gpu, self.gpus).seconds(blocks) * tokens / BLOCK

    def setting(self, blocks: int, hits: int, suffix_tokens: int) -> Setting:
        """Returns what the simulator needs to know of a prompt.

        Args:
            blocks: full blocks of the prompt.
            hits: how many of them, from the front, are stored.
            suffix_tokens: tokens after them.
        """
        return Setting(
            compute=self.step_seconds(blocks),
            chunk_bytes=self.block_bytes,
            bandwidth=self.bandwidth,
            threads=self.threads,
            layers=self.model.layers,
            suffix=self.suffix_seconds(blocks, suffix_tokens),
            holes=tuple(range(hits, blocks)),
        )
