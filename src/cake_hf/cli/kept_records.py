"""The records that a store keeps of its namespaces, for lists of its content."""

from __future__ import annotations

from collections.abc import Mapping

from cake_hf.cli.inspect_store import Chain, Inventory, StoredChunk
from cake_hf.errors import StoreError
from cake_hf.stores import Store
from cake_hf.stores.records import Record, records


def records_of(store: Store) -> dict[str, Record]:
    """Returns for each namespace what its chunks were made with, as far as the store knows; nothing if the store fails."""
    try:
        return {record.namespace: record for record in records(store)}
    except StoreError:
        return {}


def first_words(chain: Chain, inventory: Inventory, known: Mapping[str, Record]) -> str:
    """Returns the first words of a prompt, or of the document that it starts with; empty if none are kept."""
    record = known.get(chain.leaf.metadata.namespace)
    chunk: StoredChunk | None = chain.leaf if record is not None and record.words else None
    while record is not None and chunk is not None:
        if words := record.words.get(chunk.metadata.key):
            return words
        above = inventory.chunks.get(chunk.metadata.parent)
        chunk = above if above is not None and above.metadata.index == chunk.metadata.index - 1 else None
    return ""
