"""Finds the chunks, tails and snapshots of a prompt in a store, checks them, and writes them to a pack."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cake_hf.blocks import Block, blocks, checked_cuts, tail_ends
from cake_hf.chunks.stored_forms import check_any_file
from cake_hf.errors import CakeError, CorruptChunk, StoreError
from cake_hf.keys import block_keys, canonical, state_key
from cake_hf.limits import Limits
from cake_hf.model.plainly import ComputePlainly
from cake_hf.model.which_model import resolve_model
from cake_hf.restore.bound_store import check_codec
from cake_hf.restore.session import Session, chosen_chunk_size
from cake_hf.restore.support import layers_for, model_refusal, refuse_unusable
from cake_hf.scheduling.frontier import Strategy
from cake_hf.stores.base import Store
from cake_hf.stores.manifest import CARD, MANIFEST, MAX_CHUNK_BYTES, PackChunk, PackManifest, chunk_path, printable
from cake_hf.stores.mismatch import dtypes
from cake_hf.stores.opening import StoreSpec, open_store
from cake_hf.stores.pack import block_digests, digest_of

Progress = Callable[[int, int], None]


class Sink(ABC):
    """The destination of a pack."""

    name: str
    """The URL by which a reader opens the pack."""

    @abstractmethod
    def add(self, path: str, raw: bytes | bytearray) -> None:
        """Takes the file of a chunk or a snapshot."""

    @abstractmethod
    def finish(self, files: Mapping[str, bytes]) -> None:
        """Takes the manifest and the card, which turn the added files into a pack."""


@dataclass(frozen=True)
class Contents:
    """The chunks and tails of one prompt that a store has, and the snapshots of the model's recurrent state at their ends.

    Attributes:
        store: the store that has them.
        blocks: all blocks of the prompt.
        keys: keys of the stored blocks, by block number.
        states: keys of the snapshots, by block number.
        missing: number of the prompt's blocks that the store lacks, not counting a partial block at the end of the prompt if
            no cut was declared there.
        namespace, facts, salted, model, model_revision, chunk_size: as in `PackManifest`.
    """

    store: Store
    blocks: Sequence[Block]
    keys: Mapping[int, str]
    states: Mapping[int, str]
    missing: int
    namespace: str
    facts: Mapping[str, Any]
    salted: bool
    model: str
    model_revision: str
    chunk_size: int

    def write(self, sink: Sink, card: Callable[[PackManifest, str], str], progress: Progress) -> PackManifest:
        """Reads and checks the files and passes them to the sink, one at a time.

        Raises:
            CorruptChunk: a file is damaged.
            StoreError: a file cannot be read, or the sink does not take it.
        """
        files = []
        wanted = [*sorted(self.keys.items()), *sorted(self.states.items())]
        for index, key in wanted:
            raw = self._read(index, key)
            files.append(PackChunk(key, index, len(raw), digest_of([raw]), block_digests(memoryview(raw))))
            sink.add(chunk_path(key), raw)
            progress(len(files), len(wanted))
        manifest = PackManifest(
            namespace=self.namespace,
            facts=self.facts,
            salted=self.salted,
            model=self.model,
            model_revision=self.model_revision,
            dtype=dtypes(self.facts),
            chunk_size=self.chunk_size,
            chunks=tuple(files[: len(self.keys)]),
            states=tuple(files[len(self.keys) :]),
            boundaries=tuple(tail_ends(self.blocks[: max(self.keys) + 1], self.chunk_size)),
        )
        sink.finish({MANIFEST: manifest.to_json(), CARD: card(manifest, sink.name).encode()})
        return manifest

    def _read(self, index: int, key: str) -> bytearray:
        if (self.store.size(key) or 0) > MAX_CHUNK_BYTES:
            raise StoreError(f"Chunk {key} is too large for a pack; use a smaller chunk_size.")
        raw = self.store.read(key)
        if raw is None:
            raise StoreError(f"Chunk {key} was removed from the store meanwhile; try again.")
        try:
            facts = check_any_file(raw, key)
        except CorruptChunk as error:
            raise CorruptChunk(f"{error} It does not go into a pack; `cake-hf verify` finds damaged chunks.") from error
        if (facts.index, facts.namespace) != (index, self.namespace):
            raise CorruptChunk(f"Chunk {key} says that it belongs elsewhere; it does not go into a pack.")
        return raw


@contextmanager
def contents_of(
    store: StoreSpec,
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    *,
    boundaries: Iterable[int],
    chunk_size: int | str,
    salt: str,
    exact: bool,
    allow_salted: bool,
    codec: str = "none",
) -> Iterator[Contents]:
    """Finds the stored blocks and snapshots of a prompt, as a `CakeCache` with these arguments would.

    Raises:
        CakeError: KV of this model is not kept.
        StoreError: the store cannot be read or has none of the blocks, or a salt is given without `allow_salted`.
        TypeError: the boundaries are not integers.
        ValueError: `input_ids` is not a single prompt, or it is shorter than a chunk and its end is not stored; or a boundary
            is outside the prompt.
    """
    if salt and not allow_salted:
        raise StoreError(
            "This KV was saved under a salt, which keeps it apart from others; pass allow_salted=True (--allow-salted) "
            "if it may be given away."
        )
    chunk_size = chosen_chunk_size(resolve_model(model), chunk_size)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise _no_prompt(input_ids, chunk_size)
    tokens = input_ids.shape[1]
    cuts = checked_cuts(boundaries, tokens)
    opened = open_store(store)
    try:
        with session_for(model, opened, chunk_size=chunk_size, salt=salt, exact=exact, codec=codec) as session:
            facts, namespace = json.loads(canonical(session.bound_model.metadata())), session.bound_model.namespace()
            revision = getattr(session.model.config, "_commit_hash", None) or ""
            name, has_states = printable(session.bound_model.name), bool(session.bound_model.state_layout().pieces)
        named = blocks(0, tokens, cuts, chunk_size)
        keys = block_keys(namespace, input_ids[0].tolist(), named, chunk_size)
        stored = _stored(opened, dict(enumerate(keys)))
        if not stored and tokens < chunk_size:
            raise _no_prompt(input_ids, chunk_size)
        if not stored:
            raise StoreError(
                "The store has none of this prompt's chunks; save them first (cake-hf warm) with the same model and options."
            )
        last = len(keys) - 1
        may_be_absent = last not in stored and not named[last].fills(chunk_size) and named[last].end not in cuts
        missing = len(keys) - len(stored) - may_be_absent
        states = _stored(opened, {index: state_key(key) for index, key in stored.items()}) if has_states else {}
        yield Contents(opened, named, stored, states, missing, namespace, facts, bool(salt), name, revision, chunk_size)
    finally:
        if opened is not store:
            opened.close()


@contextmanager
def session_for(
    model: torch.nn.Module, store: Store, *, chunk_size: int | str, salt: str, exact: bool, codec: str = "none"
) -> Iterator[Session]:
    """Opens the session that a `CakeCache` with these arguments would have.

    Raises:
        CakeError: KV of this model is not kept, or the codec needs a library that is not installed.
        ValueError: the codec is unknown, or lossy although `exact` is set.
    """
    check_codec(codec, exact=exact)
    model = resolve_model(model)
    refuse_unusable(model)
    if refusal := model_refusal(model, layers_for(model)):
        raise CakeError(f"No KV of this model is kept: {refusal.text}.")
    session = Session(
        model,
        store,
        chunk_size=chunk_size,
        salt=salt,
        save=False,
        exact=exact,
        strategy=Strategy.BOTH,
        limits=Limits(),
        codec=codec,
    )
    try:
        yield session
    except ComputePlainly as because:
        raise CakeError(f"It cannot be told which KV is this model's: {because}.") from because
    finally:
        session.close()


def _no_prompt(input_ids: torch.Tensor, chunk_size: int) -> ValueError:
    return ValueError(
        f"A pack is made of one prompt, [1, tokens], with at least one chunk of {chunk_size} tokens, or with an end that was "
        f"stored (CakeCache.prefill, `cake-hf warm --prompt`); this is {list(input_ids.shape)}."
    )


def _stored(store: Store, keys: Mapping[int, str]) -> dict[int, str]:
    """Returns the entries whose keys the store has."""
    there = store.contains(list(keys.values()))
    return {index: key for (index, key), has in zip(keys.items(), there, strict=True) if has}


def no_progress(done: int, total: int) -> None:
    """Ignores the progress."""
