"""For tests of `max_ttft`: a line on a clock of its own, and what a model gives after chunks of which only the bases came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, Limits, MemoryStore, Store
from cake_hf.chunks.lossless import rounded
from cake_hf.testing import WrapperStore
from lossy_runs import prefilled
from models import CHUNK, Outcome, prompt, run, shared_model
from stored import chunks_of, key_in

LATE, AMPLE = 1e-9, 1e5
"""Seconds of `max_ttft`: over before anything is read, and far more than any run here takes."""

PATIENT = Limits.from_environment(loader_threads=1, read_timeout=1e8, lookup_timeout=60.0)
"""One loader, which clocks that jump do not end."""


def bfloat16_llama() -> Any:
    return shared_model("llama", "bfloat16")


def key_of(store: Store, index: int) -> str:
    """The key of a prompt's chunk."""
    return key_in(chunks_of(store)[index])


def cache_for(store: Store, max_ttft: float | None, model: Any = None, **options: Any) -> CakeCache:
    """A cache with a time to keep; None for one without, of the same keys."""
    options = {"codec": "lossless", "exact": False, "limits": PATIENT, **options}
    return CakeCache(
        bfloat16_llama() if model is None else model, store, chunk_size=CHUNK, max_ttft=max_ttft, **options
    )


def filled(store: Store | None = None, *, model: Any = None, ids: torch.Tensor | None = None, **options: Any) -> Any:
    """The store, by default a new one in memory, with the prompt's chunks."""
    store = MemoryStore() if store is None else store
    with cache_for(store, None, model, **options) as saving:
        saving.prefill(prompt() if ids is None else ids, whole=True)
        assert saving.flush(60)
    return store


def hurried(
    store: Store, max_ttft: float | None, ids: torch.Tensor | None = None, **options: Any
) -> tuple[Outcome, Any]:
    """What a run that loads all it can gives, and its report."""
    with cache_for(store, max_ttft, **{"strategy": "load", **options}) as cache:
        outcome = run(cache._session.model, prompt() if ids is None else ids, cache)
        assert cache.flush(60)
        return outcome, cache.report


def after_bases_of(chunks: Iterable[int]) -> Outcome:
    """The reference: exact chunks on a `DynamicCache`, of which these are rounded before the prompt's last piece runs."""
    model, ids = bfloat16_llama(), prompt()
    cache = prefilled(model, ids, "none")
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            for index in chunks:
                span = slice(index * CHUNK, (index + 1) * CHUNK)
                states[:, :, span] = rounded(states[:, :, span].contiguous())
    return run(model, ids, cache)


class Line(WrapperStore):
    """A store whose chunks take time to come, on a clock that nothing else moves.

    Args:
        inner: the store with the values.
        patch: replaces the clock.
        seconds: that a chunk takes, by its number.

    Attributes:
        reads: the chunk and the bytes of each read.
    """

    def __init__(
        self, inner: Store, patch: pytest.MonkeyPatch, seconds: Callable[[int], float] = lambda _: 0.0
    ) -> None:
        super().__init__(inner)
        self.reads: list[tuple[int, int]] = []
        self._index_of = {key_of(inner, index): index for index in chunks_of(inner)}
        self._seconds = seconds
        self._passed = 0.0
        patch.setattr(time, "monotonic", lambda real=time.monotonic: real() + self._passed)

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        self._take(key, 0, parts)
        return self.inner.read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        self._take(key, offset, parts)
        return self.inner.read_range(key, parts, offset)

    def bytes_of(self, index: int) -> int:
        """Bytes that were read of a chunk."""
        return sum(nbytes for read, nbytes in self.reads if read == index)

    def _take(self, key: str, offset: int, parts: Sequence[memoryview]) -> None:
        if key in self._index_of:
            index = self._index_of[key]
            self.reads.append((index, sum(part.nbytes for part in parts)))
            self._passed += self._seconds(index) if not offset else 0.0
