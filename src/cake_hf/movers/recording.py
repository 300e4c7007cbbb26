"""The record of a namespace, written once a day and process, by the thread that has just brought a chunk of it to the store."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from cake_hf.arithmetic.forks import Lock
from cake_hf.movers.deadline import in_words
from cake_hf.stores.base import Store
from cake_hf.stores.records import Record, keep
from cake_hf.tensors.fingerprint import canonical

logger = logging.getLogger("cake_hf")

DAY = 24 * 60 * 60

_kept: weakref.WeakKeyDictionary[Store, dict[str, int]] = weakref.WeakKeyDictionary()
"""By namespace the day at which its record was written in this process."""
_lock = Lock()


def recorder(store: Store, facts: Mapping[str, Any], namespace: str, model: str) -> Callable[[], None]:
    """What is to be called, by the thread that writes to the store, whenever a chunk of a namespace has become durable."""

    def record() -> None:
        now = int(time.time())
        with _lock:
            days = _kept.setdefault(store, {})
            if days.get(namespace) == now // DAY:
                return
            days[namespace] = now // DAY
        try:
            keep(store, Record(namespace, json.loads(canonical(facts)), model, now, now))
        except BaseException as error:  # the chunk is there; only words for people are missing
            logger.debug("What chunks were made with is not kept: %s", in_words(error))

    return record
