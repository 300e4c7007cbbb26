"""The workload: one long prompt with a stored prefix, and many short ones, as in the paper (3 : 1 in tokens)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.serve.virtual import Arrival, Run, StepCosts, VirtualManager
from cake_hf import MemoryStore
from cake_hf.report import Refusal
from cake_hf.stores.base import Store

SHORTEST, LONGEST = 32, 448
"""Tokens of short prompts, for a prefix of 16K tokens: 3 : 1 in tokens, as in the paper. They are scaled with the prefix."""

PREFIX = 16384

SUFFIX = 40


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        chunk, chunks: size and number of the prefix's chunks.
        shorts: number of short prompts.
        scale: of their lengths; 1 is 3 : 1, whatever the prefix.
        new: tokens of each answer.
        spread: seconds over which the short prompts come, and the long one after a quarter of them; 0 for all at once.
        dtype: of the model.
    """

    chunk: int = 512
    chunks: int = 12
    shorts: int = 22
    scale: float = 1.0
    new: int = 8
    spread: float = 0.0
    dtype: str = "float32"

    def prompts(self, vocabulary: int) -> tuple[list[int], list[list[int]]]:
        """Returns the long prompt and the short ones, the same each time."""
        generator = torch.Generator().manual_seed(5)

        def some(tokens: int) -> list[int]:
            ids: list[int] = torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()
            return ids

        document, step = some(self.chunk * self.chunks + SUFFIX), (LONGEST - SHORTEST) / max(1, self.shorts - 1)
        scale = self.scale * self.chunk * self.chunks / PREFIX
        lengths = [max(4, int((SHORTEST + round(i * step)) * scale)) for i in range(self.shorts)]
        order = torch.randperm(self.shorts, generator=generator).tolist()
        return document, [some(lengths[i]) for i in order]

    def arrivals(self, vocabulary: int) -> list[Arrival]:
        """Returns the requests; the long one is the first in the list."""
        document, shorts = self.prompts(vocabulary)
        count = max(1, len(shorts))
        return [
            Arrival(self.spread / 4, "document", document),
            *(Arrival(self.spread * (i + 1) / count, f"short {i:02}", ids) for i, ids in enumerate(shorts)),
        ]

    def blocks(self) -> int:
        """Returns how many blocks the engine's memory has: enough for all requests, and a margin."""
        return int(1.3 * (self.chunks + 10 + 2 * self.shorts))


def small_model(dtype: str) -> Any:
    """A Llama of 4 layers with random weights, whose steps take tenths of a second on one core."""
    return _llama(dtype, vocabulary=4096, size=384, layers=4, heads=6)


def least_model(dtype: str) -> Any:
    """A Llama that computes next to nothing, for runs in which a formula says what steps take."""
    return _llama(dtype, vocabulary=64, size=16, layers=1, heads=2)


def _llama(dtype: str, vocabulary: int, size: int, layers: int, heads: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=32768,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


class Bench:
    """Runs a workload in several ways.

    Args:
        model: to run.
        load: the workload.
        spread: the short prompts come over this many times the long one's compute time.
        costs: of steps; None to measure them.

    Attributes:
        compute: seconds to compute each chunk of the prefix, alone.
        alone: seconds to the first token of the long prompt, if it is computed alone.
        decoding: seconds of the other tokens of its answer.
        others: seconds that the short prompts take without it.
    """

    def __init__(self, model: Any, load: Workload, spread: float = 0.0, costs: StepCosts | None = None) -> None:
        self.model, self.load, self._costs = model, load, costs
        self._store = MemoryStore()
        vocabulary = int(model.config.vocab_size)
        self._arrivals = load.arrivals(vocabulary)
        document = self._arrivals[0]
        self.compute: list[float] = []
        first = self.run("both", store=self._store, arrivals=[document])
        again = self.run("both", arrivals=[document])
        for spans in zip(first.reports["document"].timeline, again.reports["document"].timeline, strict=True):
            self.compute.append(min(span.end - span.start for span in spans))
        self.alone = min(one.ttft["document"] for one in (first, again))
        self.decoding = min(one.span - one.ttft["document"] for one in (first, again))
        self.others = self.run("plain", arrivals=[Arrival(0.0, *one[1:]) for one in self._arrivals[1:]]).span
        self._arrivals = replace(load, spread=spread * self.alone).arrivals(vocabulary)

    def run(
        self, way: str, share: float = 0.0, *, store: Store | None = None, arrivals: Sequence[Arrival] | None = None
    ) -> Run:
        """Runs the workload once.

        Args:
            way: "plain" for transformers' own engine; "cold" for an empty store; or a strategy.
            share: seconds to load the prefix, by those to compute it.
            store: with the prefix's chunks; a new one for a cold run.
            arrivals: the requests; those of the workload by default.
        """
        load = self.load
        warm = way in ("both", "load") and share
        manager = VirtualManager(
            self.model,
            self._store if warm else store or MemoryStore(),
            interval=share * self.alone / load.chunks if warm else 0.0,
            costs=self._costs,
            generation_config=GenerationConfig(
                max_new_tokens=load.new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=load.chunk, num_blocks=load.blocks(), max_batch_tokens=load.chunk
            ),
            chunk_size=load.chunk,
            strategy="load" if way == "load" else "both",
            save=not warm,
        )
        try:
            if way == "plain":
                manager._model_refusal = Refusal("compared", "transformers' own engine, to compare with")
            if self.compute:
                manager.believe(self.compute)
            run = manager.run(self._arrivals if arrivals is None else arrivals, load.new)
            manager.flush(60)
            return run
        finally:
            manager.batch_processor = None
            manager.close()
            gc.collect()  # the engine's memory, which is part of a cycle

    def bound(self, share: float) -> float:
        """Returns the seconds before which no schedule can end.

        The short prompts and the front take the engine's time. The rest of the prefix is loaded meanwhile, and only then come
        the long prompt's last tokens and its answer.
        """
        load, n = share * self.alone / self.load.chunks, self.load.chunks
        behind = max(0.0, self.alone - sum(self.compute)) + self.decoding
        return min(max(self.others + sum(self.compute[:k]), (n - k) * load + behind) for k in range(n + 1))
