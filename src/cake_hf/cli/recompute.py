"""`cake-hf verify --recompute`: computes a sample of stored chunks again and compares them, bit for bit.

A checksum says that a chunk is what somebody wrote. Only the model can say whether that is what it computes. Chunks hold no
tokens (keys are digests of them), so the texts must be given.
"""

from __future__ import annotations

import math
import random
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text

from cake_hf.cache import CakeCache
from cake_hf.chunks.codec import Buffer, parse_header
from cake_hf.chunks.encoded_header import is_encoded
from cake_hf.chunks.stored_forms import raw_file
from cake_hf.chunks.tensor_table import offsets_of
from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.documents import load_with, read_warmed
from cake_hf.cli.models import refuse_too_long
from cake_hf.cli.options import WarmedOptions
from cake_hf.cli.verify import BadChunk
from cake_hf.cli.warm import Pace
from cake_hf.errors import CakeError, StoreError
from cake_hf.keys import state_key
from cake_hf.limits import Limits
from cake_hf.stores import Store
from cake_hf.stores.base import Part
from cake_hf.stores.wrappers import WrapperStore
from cake_hf.util.redaction import shown
from cake_hf.util.sizes import count_text


@dataclass(frozen=True)
class RecomputeJob:
    """The chunks to be computed again.

    Attributes:
        model: a folder, or a name on the Hub.
        prompts: UTF-8 text files whose chunks, and tails, are sampled.
        share: of each prompt's stored chunks, but at least one of them; in (0, 1].
        warmed: how the prompts were warmed.
        seed: the seed of the choice. The same store, prompts and seed give the same sample.
    """

    model: str
    prompts: Sequence[Path]
    share: float
    warmed: WarmedOptions
    seed: int = 0


@dataclass(frozen=True)
class Recomputed:
    """The result.

    Attributes:
        sampled: chunks that were computed again.
        stored: chunks of the prompts that the store has.
        bad: those that differ from what the model computes.
    """

    sampled: int
    stored: int
    bad: list[BadChunk]


def recompute(job: RecomputeJob, store: Store) -> Recomputed:
    """Loads the model and checks a sample of each prompt's chunks.

    Raises:
        CakeError: the store has no chunk of a prompt, or a prompt cannot be restored at all.
        ValueError: the model or a file cannot be used.
    """
    documents = [read_warmed(path, job.warmed) for path in job.prompts]
    model, prompts = load_with(job.model, documents, job.warmed)
    found = []
    for path, ids in zip(job.prompts, prompts, strict=True):
        refuse_too_long(model.config, ids.shape[1], "give a shorter text.")
        found.append(recompute_prompt(job, store, model, ids, str(path)))
    bad = {chunk.key: chunk for each in found for chunk in each.bad}  # prompts may share chunks
    return Recomputed(sum(each.sampled for each in found), sum(each.stored for each in found), list(bad.values()))


def recompute_prompt(job: RecomputeJob, store: Store, model: Any, ids: torch.Tensor, name: str) -> Recomputed:
    """Computes one prompt from its start to the last sampled chunk, and compares the sampled ones with the stored ones.

    The end counts as declared: that changes no chunk before it, and shows whether the store has the tail there. Nothing
    stored goes into the computation, so a forged chunk cannot vouch for the next one.

    Raises:
        CakeError: see `recompute`.
        ValueError: a boundary is outside of the prompt.
    """
    comparing = Comparing(store, job.share, job.seed)
    limits = Limits.from_environment()
    with CakeCache(
        model,
        comparing,
        **job.warmed.keyed,
        strategy="compute",
        limits=limits,
        snapshot_every=1,  # wherever the store may have one
    ) as cache:
        pace = Pace(cache, limits.save_queue_bytes // 2)
        with progress_bar(f"computing {name}", "chunks") as show:

            def progress(done: int, total: int) -> None:
                show(done, comparing.last)
                pace(done)
                if done >= comparing.last:
                    raise _Enough

            try:
                report = cache.prefill(ids, boundaries=job.warmed.boundary or (), progress=progress)
            except _Enough:
                report = cache.report
        cache.flush()
    if not comparing.asked:
        raise CakeError(f"{name} cannot be computed in chunks: {report.reason}.")
    if not comparing.sample and ids.shape[1] < report.chunk_size:
        raise CakeError(
            f"{name} has less than one chunk of {report.chunk_size} tokens, and the store does not have its end, which "
            "`cake-hf warm --prompt` keeps."
        )
    if not comparing.sample:
        raise CakeError(
            f"The store has no chunk of {name} for this model, chunk size, dtype, salt and machine; give the options that it "
            "was saved with (`cake-hf ls STORE` shows what is there)."
        )
    missed = len(comparing.sample) - comparing.compared
    if missed:
        raise CakeError(f"{missed} of {len(comparing.sample)} sampled chunks could not be compared; run it again.")
    return Recomputed(len(comparing.sample), comparing.stored, comparing.bad)


class _Enough(Exception):
    """Not an error: the last sampled chunk has been computed, and the rest of the prompt is not needed."""


class Comparing(WrapperStore):
    """Looks like an empty store to a cache. Each chunk that the cache writes is compared with the stored one, and written
    nowhere.

    Attributes:
        asked: whether the cache has asked for chunks at all.
        stored: how many of the chunks asked for are there.
        sample: keys of those that are compared.
        last: how many of the prompt's chunks must be computed for that.
        compared: how many have been compared.
        bad: those that differ.
    """

    def __init__(self, inner: Store, share: float, seed: int) -> None:
        super().__init__(inner)
        self.read_only = False  # written values are compared and dropped, so a pack will do, too
        self._share, self._seed = share, seed
        self._lock = threading.Lock()
        self.asked = False
        self.stored = self.last = self.compared = 0
        self.sample: set[str] = set()
        self._known: set[str] = set()
        self.bad: list[BadChunk] = []

    def contains(self, keys: Sequence[str]) -> list[bool]:
        if self._known.issuperset(keys):  # the end of the document, which was among all its keys before
            return [False] * len(keys)
        self._known = set(keys)
        stored = [index for index, has in enumerate(self.inner.contains(keys)) if has]
        chosen = random.Random(self._seed).sample(stored, math.ceil(self._share * len(stored)))
        snapshots = {state_key(key): number for number, key in enumerate(keys)}
        numbers = [snapshots.get(keys[index], index) for index in chosen]
        self.asked, self.stored, self.last = True, len(stored), max(numbers, default=-1) + 1
        self.sample = {keys[index] for index in chosen}
        return [False] * len(keys)

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        if key in self.sample:
            why = self._difference(key, b"".join(parts))
            with self._lock:
                self.compared += 1
                self.bad += [BadChunk(key, why, corrupt=True)] if why else []
        return True

    def check_writable(self) -> None:
        """Does nothing: nothing will be written."""

    def notes(self) -> Mapping[str, bytes]:
        """Returns nothing, as an empty store does."""
        return {}

    def put_note(self, name: str, note: bytes | None) -> None:
        """Drops the note, as chunks are dropped."""

    def _difference(self, key: str, computed: bytes) -> str:
        """Returns how the stored chunk differs from the computed one; empty if it does not, in what counts, or if it is
        gone."""
        try:
            if is_encoded(computed):
                computed = bytes(raw_file(computed, key))
            size = self.inner.size(key)
            if size is not None and size > 2 * len(computed):  # its header must not make us take memory before that
                return f"Chunk {key} has {size} bytes, which no chunk of this model has."
            stored = self.inner.read(key)
            if stored is None:
                return ""
            raw = raw_file(stored, key)
            metadata, stored_table = parse_header(raw)
        except StoreError as error:
            return shown(error)
        own, table = parse_header(computed)
        if stored_table != table:
            return f"Chunk {key} holds other tensors than the model's KV."
        if (metadata.parent, metadata.index, metadata.namespace) != (own.parent, own.index, own.namespace):
            return f"Chunk {key} says that it is number {metadata.index}; it is number {own.index} of its prompt."
        differing = np.flatnonzero(_payload(raw) != _payload(computed))
        if not differing.size:
            return ""
        where = next(name for name, entry in table.items() if int(differing[0]) < offsets_of(entry)[1])
        return (
            f"Chunk {key} (number {own.index}) is well-formed and is not what the model computes: {differing.size:,} of "
            f"{_payload(computed).size:,} bytes differ, the first in {where}."
        )


def show_recomputed(result: Recomputed) -> None:
    """Shows how many chunks were computed again."""
    of = f"{count_text(result.sampled, 'chunk')} of {result.stored:,} computed again"
    if result.bad:
        console.print(f"{of}, {len(result.bad)} are not what the model computes.", style="bold red")
    else:
        console.print(Text.assemble(("The sample is true:", "green"), f" {of}, equal bit for bit."))


def _payload(raw: Buffer) -> np.ndarray[Any, np.dtype[np.uint8]]:
    (length,) = struct.unpack("<Q", bytes(raw[:8]))
    return np.frombuffer(raw, np.uint8)[8 + length :]
