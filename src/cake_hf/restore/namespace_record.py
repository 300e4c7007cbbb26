"""Writes the record of a namespace, once a day per process, in the thread that has just saved a chunk of it."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cake_hf.stores.base import Store
from cake_hf.stores.records import Record, keep
from cake_hf.transfer.deadline import Late, ask
from cake_hf.util.canonical import canonical
from cake_hf.util.forks import Lock

logger = logging.getLogger("cake_hf")

DAY = 24 * 60 * 60

_kept: weakref.WeakKeyDictionary[Store, dict[str, int]] = weakref.WeakKeyDictionary()
"""The day on which a namespace's record was written in this process, by namespace."""
_lock = Lock()


def recorder(
    store: Store, metadata: Mapping[str, Any], namespace: str, model: str, seconds: float, late: Late
) -> Callable[[], None]:
    """Returns a function for the thread that writes to the store, to be called whenever a chunk of a namespace became durable.

    Args:
        store: with the chunk.
        metadata: the metadata that the namespace is a digest of, without the salt.
        namespace: of the chunk.
        model: its name, for display.
        seconds: that the thread waits for the write to finish.
        late: questions about notes that were not answered in time; while there are any, nothing is written.
    """

    def record() -> None:
        now = int(time.time())
        with _lock:
            days = _kept.setdefault(store, {})
            if days.get(namespace) == now // DAY:
                return
            days[namespace] = now // DAY
        answer = ask(partial(_keep, store, metadata, namespace, model, now), seconds, "notes", late)
        if answer.error is not None:  # the chunk is there; only its description is missing
            logger.debug("What chunks were made with is not kept: %s", answer.trouble)

    return record


def _keep(store: Store, metadata: Mapping[str, Any], namespace: str, model: str, now: int) -> None:
    keep(store, Record(namespace, json.loads(canonical(metadata)), model, now, now))
