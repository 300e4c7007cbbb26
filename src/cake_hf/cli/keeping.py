"""What a store may take, and what it may not lose, in a sentence."""

from __future__ import annotations

from contextlib import suppress

from cake_hf.errors import StoreError
from cake_hf.stores import LocalStore, MemoryStore, Store, open_store
from cake_hf.util.redaction import shown
from cake_hf.util.sizes import bytes_text, count_text


def what_it_keeps(store: Store) -> str:
    """Of a directory; empty for other kinds, which have rules of their own.

    Raises:
        StoreError: it cannot be looked at.
    """
    if not isinstance(store, LocalStore):
        return ""
    budget = store.budget()
    may = "It may take as much as there is" if budget is None else f"It may take {bytes_text(budget)}"
    share = f", {store.share}" if budget is not None and store.share else ""
    pinned = store.pinned()
    pins = f" {count_text(len(pinned), 'chunk')} of it are pinned." if pinned else ""
    return f"{may}{share}; eviction is {store.eviction}.{pins}"


def refuse_over_budget(store: Store, nbytes: int) -> None:
    """Raise where a store could never take a chunk, before anything is computed for it.

    Args:
        store: that is to be written to.
        nbytes: of a chunk.

    Raises:
        StoreError: its budget is smaller; or it cannot be looked at.
    """
    budget = store.budget() if isinstance(store, LocalStore | MemoryStore) else None
    if budget is not None and budget < nbytes:
        raise StoreError(f"A chunk of {nbytes:,} bytes is over the store's budget of {budget:,}; raise it.")


def said_of_new(spec: str) -> str:
    """What a directory may take, to be told before a store is made there; empty where there is one, and for other kinds."""
    if spec.startswith(("memory:", "pack:")) or ("://" in spec and not spec.startswith("file:")):
        return ""
    with suppress(StoreError), open_store(spec) as store:  # who writes to it says what is wrong
        if isinstance(store, LocalStore) and next(store.keys(), None) is None:
            return f"{shown(str(store.root))} is a new store. {what_it_keeps(store)}"
    return ""
