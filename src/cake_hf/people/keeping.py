"""What a store may take, and what it may not lose, in a sentence."""

from __future__ import annotations

from cake_hf.people.units import bytes_text, count_text
from cake_hf.stores import LocalStore, Store


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
