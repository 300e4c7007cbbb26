"""The first words of a document, kept beside its chunks for `cake-hf ls`, only on request."""

from __future__ import annotations

import json
import time

from cake_hf.cache.restoring import RestoringCache
from cake_hf.keys import canonical
from cake_hf.stores.records import Record, keep

MOST_KEPT = 8
"""The most words that are kept."""

MAX_LETTERS = 80

SALTED_WORDS = (
    "First words are not kept of what is saved under a salt, since others could read them; leave out --keep-words."
)


def keep_words(cache: RestoringCache, text: str) -> None:
    """Keeps the first words of the document that a cache holds. Call it once the document's chunks are durable.

    Args:
        cache: that was prefilled with the document.
        text: of the document.

    Raises:
        ValueError: there is a salt, whose purpose is to hide documents from others.
        StoreError: they cannot be kept.
    """
    session = cache._session
    if session.salt:
        raise ValueError(SALTED_WORDS)
    if not cache._held.keys:
        return
    now, words = int(time.time()), " ".join(text.split(maxsplit=MOST_KEPT)[:MOST_KEPT])[:MAX_LETTERS]
    namespace, metadata = (
        session.bound_model.latest_namespace(),
        json.loads(canonical(session.bound_model.latest_metadata())),
    )
    keep(
        session.bound_store.store,
        Record(namespace, metadata, session.bound_model.name, now, now, {cache._held.keys[-1]: words}),
    )
