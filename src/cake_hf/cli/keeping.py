"""Sentences about a store's budget, and about what must not be evicted from it."""

from __future__ import annotations

from contextlib import suppress

from cake_hf.errors import StoreError
from cake_hf.stores import LocalStore, MemoryStore, Store, open_store
from cake_hf.util.redaction import shown
from cake_hf.util.sizes import bytes_text, count_text


def what_it_keeps(store: Store) -> str:
    """Describes a directory's budget; empty for other kinds of stores, which have rules of their own.

    Raises:
        StoreError: it cannot be looked at.
    """
    if not isinstance(store, LocalStore):
        return ""
    budget = store.budget()
    may = "It may use all available space" if budget is None else f"It may take {bytes_text(budget)}"
    share = f", {store.share}" if budget is not None and store.share else ""
    pinned = store.pinned()
    pins = f" {count_text(len(pinned), 'chunk')} of it are pinned." if pinned else ""
    return f"{may}{share}; the eviction policy is {store.eviction}.{pins}"


def refuse_over_budget(store: Store, nbytes: int) -> None:
    """Raises an error if a store's budget is smaller than one chunk, before anything is computed for it.

    Raises:
        StoreError: its budget is smaller; or it cannot be looked at.
    """
    budget = store.budget() if isinstance(store, LocalStore | MemoryStore) else None
    if budget is not None and budget < nbytes:
        raise StoreError(f"A chunk of {nbytes:,} bytes is over the store's budget of {budget:,}; raise it.")


def said_of_new(spec: str) -> str:
    """Returns what a new directory will hold at most, to be shown before a store is made there; empty if it exists, and for
    other kinds."""
    if spec.startswith(("memory:", "pack:")) or ("://" in spec and not spec.startswith("file:")):
        return ""
    with suppress(StoreError), open_store(spec) as store:  # the code that writes to it says what is wrong
        if isinstance(store, LocalStore) and next(store.keys(), None) is None:
            return f"{shown(str(store.root))} is a new store. {what_it_keeps(store)}"
    return ""
