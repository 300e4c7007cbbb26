"""Stores with a prompt's chunks in them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from cake_hf import CakeCache, MemoryStore, Store
from cake_hf.chunks.codec import ChunkMetadata, parse_header
from cake_hf.chunks.encoded_header import is_encoded, parse_encoded_header
from cake_hf.keys import behaviour_key, state_key
from models import CHUNK, prompt

_made: WeakKeyDictionary[torch.nn.Module, dict[tuple[int, ...], MemoryStore]] = WeakKeyDictionary()


def filled_store(model: torch.nn.Module, ids: torch.Tensor | None = None) -> MemoryStore:
    """A new store with all chunks of the prompt and, if the model has such, the recurrent states at their end.

    They are computed once per model and prompt, so the model has to stay as it is.

    Args:
        model: that computes them.
        ids: `[1, tokens]`; by default those of `prompt()`.
    """
    ids = prompt() if ids is None else ids
    known = _made.setdefault(model, {})
    tokens = tuple(ids[0].tolist())
    if tokens not in known:
        known[tokens] = MemoryStore()
        with CakeCache(model, known[tokens], chunk_size=CHUNK) as saving:
            saving.prefill(ids, whole=True)
    return without(known[tokens])


def without(store: Store, *indices: int) -> MemoryStore:
    """A copy of a store that has not those chunks (nor what else is kept at their ends)."""
    copy = MemoryStore()
    for key in store.keys():  # noqa: SIM118  # a store is no mapping
        value = store.read(key)
        if value is not None and parse_header(value)[0].index not in indices:
            copy.write(key, [value])
    return copy


def keys_in_order(store: Store) -> list[str]:
    """The keys of one prompt's chunks, as they stand in it."""
    return sorted(store.keys(), key=lambda key: parse_header(store.read(key) or b"")[0].index)


def values_of(store: Store) -> dict[str, bytes]:
    """All values of a store by their keys."""
    return {key: bytes(store.read(key) or b"") for key in store.keys()}  # noqa: SIM118  # a store is no mapping


def facts_in(value: bytes) -> ChunkMetadata:
    """What a stored file of either form says about itself."""
    return parse_encoded_header(value)[0].facts if is_encoded(value) else parse_header(value)[0]


def key_in(value: bytes) -> str:
    """The key in a stored file of either form."""
    return facts_in(value).key


def chunks_of(store: Store) -> dict[int, bytes]:
    """The stored files of one prompt's chunks by their place in it."""
    found = {}
    for value in values_of(store).values():
        facts = facts_in(value)
        if facts.key not in (state_key(facts.parent), behaviour_key(facts.namespace)):
            found[facts.index] = value
    return found
