"""The record of a namespace, written once a day and process, by the thread that has just brought a chunk of it to the store."""

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
"""By namespace the day at which its record was written in this process."""
_lock = Lock()


def recorder(
    store: Store, facts: Mapping[str, Any], namespace: str, model: str, seconds: float, late: Late
) -> Callable[[], None]:
    """What is to be called, by the thread that writes to the store, whenever a chunk of a namespace has become durable.

    Args:
        store: with the chunk.
        facts: that the namespace is a digest of, but for the salt.
        namespace: of the chunk.
        model: its name, for people.
        seconds: that the writing may take, before it is left to itself.
        late: questions about notes that were not answered in time; while there are any, nothing is written.
    """

    def record() -> None:
        now = int(time.time())
        with _lock:
            days = _kept.setdefault(store, {})
            if days.get(namespace) == now // DAY:
                return
            days[namespace] = now // DAY
        answer = ask(partial(_keep, store, facts, namespace, model, now), seconds, "notes", late)
        if answer.error is not None:  # the chunk is there; only words for people are missing
            logger.debug("What chunks were made with is not kept: %s", answer.trouble)

    return record


def _keep(store: Store, facts: Mapping[str, Any], namespace: str, model: str, now: int) -> None:
    keep(store, Record(namespace, json.loads(canonical(facts)), model, now, now))
