"""The ways to answer questions about one document."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from cake_hf.cache import CakeCache
from cake_hf.layers.compat import cache_name, forward_of
from eval.walk.taken import COMPUTE, LOAD, Asker, Clock, Prepared, Taken

SINGLE, CHUNKED, COLD = "single", "chunked", "cold"
RECIPE, COPIED, DIRECT = "recipe", "copied", "direct"
TORCH_LOAD, NEW = "torch.load", "new process"
PIECES = "pieces"

WAYS = {
    SINGLE: "generate",
    CHUNKED: "generate, in chunks",
    COLD: "cake_hf, first time",
    RECIPE: "DynamicCache, copied",
    COPIED: "cake_hf, copied",
    DIRECT: "cake_hf, not copied",
    TORCH_LOAD: "torch.load, new process",
    NEW: "cake_hf, new process",
}
"""Way -> name for people; docs/walk.md describes each."""

OURS = (COLD, COPIED, DIRECT, NEW)


@dataclass(frozen=True)
class Ways:
    """All ways except those in other processes, with one model and one document.

    Attributes:
        asker: asks the model.
        ids: `[1, tokens]` of the document.
        chunk_size: of our caches, and of transformers' chunks.
    """

    asker: Asker
    ids: torch.Tensor
    chunk_size: int

    @property
    def model(self) -> Any:
        """The model."""
        return self.asker.model

    def single(self, question: int = 0) -> Taken:
        """Runs `generate` as it comes."""
        return self.asker.ask(SINGLE, question, Prepared(self._plain_cache()))

    def chunked(self, question: int = 0) -> Taken:
        """Runs transformers' own chunks."""
        plain = Prepared(self._plain_cache())
        return self.asker.ask(CHUNKED, question, plain, prefill_chunk_size=self.chunk_size)

    def cold(self, store: Path) -> Taken:
        """Runs ours with an empty store; the document's end is declared, so that all of it is saved."""
        clock = Clock()
        with clock.lap(COMPUTE):
            cache = CakeCache(self.model, store)
            report = cache.prefill(self.ids)
        return self.asker.ask(COLD, 0, Prepared(cache, clock, report), finish=lambda used: used.close())

    def recipe(self) -> Prepared:
        """Returns a `DynamicCache` that was run over the document in one forward.

        The recipe's own words compute logits of all tokens, which are not needed; here it is spared that.
        """
        clock, cache = Clock(), self._plain_cache()
        with clock.lap(COMPUTE):
            self._run(cache, 0, self.ids.shape[1])
        return Prepared(cache, clock)

    def pieces(self) -> Prepared:
        """Returns a `DynamicCache` that was run over the document in our pieces: ours must equal it, bit for bit."""
        clock, cache, end = Clock(), self._plain_cache(), self.ids.shape[1]
        with clock.lap(COMPUTE):
            for start in range(0, end, self.chunk_size):
                self._run(cache, start, min(start + self.chunk_size, end))
        return Prepared(cache, clock)

    def restored(self, store: Path) -> Prepared:
        """Returns our cache with the document restored from the store."""
        clock = Clock()
        with clock.lap(LOAD):
            cache = CakeCache(self.model, store)
            report = cache.prefill(self.ids)
        return Prepared(cache, clock, report)

    def loaded(self, file: Path) -> Prepared:
        """Returns a `DynamicCache` as `torch.save` has left it."""
        clock = Clock()
        cache = clock.take(LOAD, lambda: torch.load(file, weights_only=False))
        return Prepared(cache, clock)

    def copied(self, way: str, question: int, prepared: Prepared) -> Taken:
        """Asks a question on a copy."""
        return self.asker.ask(way, question, prepared, copied=copy.deepcopy)

    def used_up(self, way: str, question: int, prepared: Prepared) -> Taken:
        """Asks a question without a copy; the cache then holds the answer, too."""
        return self.asker.ask(way, question, prepared)

    def _plain_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def _run(self, cache: DynamicCache, start: int, end: int) -> None:
        named = {cache_name(forward_of(self.model)): cache}
        mask = torch.ones_like(self.ids[:, :end])
        self.model(self.ids[:, start:end], attention_mask=mask, logits_to_keep=1, **named)
