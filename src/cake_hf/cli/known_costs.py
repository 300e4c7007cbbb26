"""The costs of computing and loading with a model and a store: from the store's notes, or measured now.

A namespace is made from a model's weights, which would have to be loaded. But the chunks in a store name their model and
namespace, so the costs learned while they were made and used can be found with the model's name and config alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from cake_hf.cache import CakeCache
from cake_hf.chunks.layout import dtype_name
from cake_hf.cli.inspect_store import Namespace, StoredChunk, namespaces, read_chunk, take_inventory
from cake_hf.errors import CakeError
from cake_hf.layers.compat import named_for
from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.pace import Pace
from cake_hf.stores.base import Part, Store
from cake_hf.stores.wrappers import WrapperStore
from cake_hf.transfer.cost_notes import recall_costs

SHORT_CHUNKS = 4
"""Chunks of the prompt that costs are measured with."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CostQuery:
    """The model and device whose costs are wanted.

    Attributes:
        model: a folder, or a name on the Hub.
        config: the config of that model.
        device: that computes, as torch names it.
        chunk_size: tokens; None for any.
        dtype: the dtype of the KV, as torch names it; "auto" for any.
    """

    model: str
    config: Any
    device: str
    chunk_size: int | None = None
    dtype: str = "auto"

    @property
    def name(self) -> str:
        """The model's name as chunks have it: the name on the Hub, or the last part of a path."""
        path = Path(self.model).expanduser()
        return path.name if path.is_absolute() or path.exists() else self.model

    def fits(self, chunk: StoredChunk) -> bool:
        """Returns whether a chunk is of this model, as far as its header tells."""
        layers = {name.rsplit(".", 1)[0] for name in chunk.table}
        return (
            chunk.metadata.model == self.name
            and len(layers) == self.config.get_text_config().num_hidden_layers
            and self.chunk_size in (None, chunk.chunk_size)
            and (self.dtype == "auto" or chunk.table.dtypes == dtype_name(getattr(torch, self.dtype)))
        )


@dataclass(frozen=True)
class KnownCosts:
    """Costs, and what they are costs of.

    Attributes:
        namespace: digest.
        chunk_size: tokens per chunk.
        dtype: the dtype of the KV, as safetensors names it.
        costs: at least one half of them is known.
    """

    namespace: str
    chunk_size: int
    dtype: str
    costs: Costs


def remembered(store: Store, wanted: CostQuery, progress: Progress) -> KnownCosts | None:
    """Returns the costs in the store's notes; None if there are none.

    Of several namespaces, one with both halves known comes first; then the one with the most stored bytes.

    Args:
        store: any; one without room for notes remembers only what this process has done.
        wanted: whose costs.
        progress: called with (chunks that were looked at, all chunks).
    """
    fitting = [found for found in namespaces(take_inventory(store, progress)) if wanted.fits(found.first)]
    known = [found for found in (_recalled(store, namespace, wanted.device) for namespace in fitting) if found]
    return min(known, key=lambda candidate: None in (candidate.costs.compute, candidate.costs.load), default=None)


def measure(model: Any, store: Store, chunk_size: int, chunks: int) -> KnownCosts:
    """Computes and reads a few chunks of random tokens, and stores what that cost.

    A short prompt is computed and saved, computed again, and loaded twice: the first time of each is a cold one. Then the
    prompt's last chunk is computed behind a context of zeros, which costs as much as any other context and shows how costs
    grow with the place. The chunks are removed again. (If the store is a disk, they were read from the page cache.)

    Args:
        model: with its weights on the device.
        store: a writable one.
        chunk_size: tokens.
        chunks: of the prompt to plan for; at least 1.

    Raises:
        CakeError: this model's chunks cannot be restored, or cannot be saved.
    """
    noting = _NotingStore(store)
    few = min(SHORT_CHUNKS, chunks)
    try:
        ids = _random_prompt(model, few * chunk_size + 1)
        saved = _prefill(model, noting, chunk_size, ids, few, strategy="both", save=True)
        for strategy in ("load", "compute", "load"):
            _prefill(model, noting, chunk_size, ids, few, strategy=strategy)
        stored = read_chunk(store, noting.written[0])
        if stored is None:
            raise CakeError("The store has lost a chunk that was just saved; is another process deleting from it?")
        device = str(next(model.parameters()).device)
        if chunks > few:
            seconds = _last_chunk_seconds(model, saved, chunk_size, chunks)
            pace = Pace(Costs())
            pace.saw_forward(chunks - 1, seconds)
            recall_costs(noting, stored.metadata.namespace, device).learn(pace, [], stored.table.payload_bytes)
        found = _recalled(noting, Namespace(stored.metadata.namespace, [stored]), device)
    finally:
        for key in noting.written:
            store.delete(key)
    if found is None:
        raise CakeError("Nothing was learned from computing and loading; please report this.")
    return found


def _random_prompt(model: Any, tokens: int) -> torch.Tensor:
    """Returns a prompt that no store can have."""
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    return torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=generator)


class _NotingStore(WrapperStore):
    """Records what was written to the store inside, so that it can be removed."""

    counts_hits = False

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.written: list[str] = []

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        new = super().write(key, parts, replace=replace)
        if new:
            self.written.append(key)
        return new

    def put_note(self, name: str, note: bytes | None) -> None:
        """Drops the note, since the chunks are removed again."""

    def notes_folder(self) -> Path | None:
        return self.inner.notes_folder()


def _recalled(store: Store, namespace: Namespace, device: str) -> KnownCosts | None:
    chunk = namespace.first
    costs = recall_costs(store, namespace.digest, device).costs()
    if costs.compute is None and costs.load is None:
        return None
    return KnownCosts(namespace.digest, chunk.chunk_size, chunk.table.dtypes, costs)


def _prefill(
    model: Any, store: Store, chunk_size: int, ids: torch.Tensor, chunks: int, *, strategy: str, save: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Runs one prompt through a new cache; returns its KV.

    Raises:
        CakeError: it was not restored as it should be.
    """
    with CakeCache(model, store, chunk_size=chunk_size, strategy=strategy, save=save) as cache:
        report = cache.prefill(ids, whole=True)
        cache.flush()
        wanted = chunks if strategy == "load" else 0
        unsaved = save and report.chunks_saved != report.chunks_computed
        if report.chunks_loaded != wanted or report.chunks_computed + wanted != chunks or unsaved:
            raise CakeError(f"Costs cannot be measured with this model and store: {report.reason or report}")
        return [(layer.keys, layer.values) for layer in cache.layers]


def _last_chunk_seconds(
    model: Any, template: Sequence[tuple[torch.Tensor, torch.Tensor]], chunk_size: int, chunks: int
) -> float:
    """Returns the seconds for the prompt's last chunk, behind as long a context as it will have; the second of two tries."""
    seconds = 0.0
    context, device = (chunks - 1) * chunk_size, next(model.parameters()).device
    ids = torch.zeros((1, chunk_size), dtype=torch.long, device=device)
    for _ in range(2):
        pairs = [tuple(t.new_zeros((1, t.shape[1], context, t.shape[3])) for t in pair) for pair in template]
        cache = DynamicCache(pairs, config=model.config)
        _synchronize(device)
        begin = time.monotonic()
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **named_for(model, cache))
        _synchronize(device)
        seconds = time.monotonic() - begin
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
