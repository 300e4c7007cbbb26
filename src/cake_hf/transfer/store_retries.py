"""What this process knows about the stores that users name: whether they were ever usable, and when to try again."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from cake_hf.errors import StoreError
from cake_hf.stores.base import Store
from cake_hf.stores.opening import StoreSpec, directory_of
from cake_hf.stores.tier import Tier
from cake_hf.transfer.deadline import Call, in_words
from cake_hf.transfer.fault_log import FaultLog
from cake_hf.transfer.single_flight import Sharing
from cake_hf.util import environment
from cake_hf.util.forks import Lock, renewed_in_child

REST_FACTOR, LEAST_REST, MOST_REST = 10.0, 1.0, 60.0
"""A store that failed is left alone for so many times as long as the failure took: one that keeps everybody waiting is seldom
tried again, though never after more seconds than the last number; and one that fails at once with the next prompt."""

MOST_DOORS = 1024
"""Names of stores that are remembered."""


class Door:
    """What is known of one name of a store. Get it from `door_of`.

    Attributes:
        known: the store was usable earlier in this process.
        faults: that were told; forgotten when all is well again.
        sharing: what its users share, kept between them: who comes next knows what hangs.
        failure: what the last attempt failed by.
    """

    def __init__(self) -> None:
        self.known = False
        self.faults = FaultLog()
        self.sharing: Sharing | None = None
        self.failure: StoreError | None = None
        self._rests_until = float("-inf")
        self._begin_anew()
        renewed_in_child(self._begin_anew)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._late: tuple[Call[Any], Hashable] | None = None

    def rests(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic() < self._rests_until

    def failed(self, failure: BaseException, seconds: float) -> None:
        """An attempt has failed after so long."""
        rest = min(MOST_REST, REST_FACTOR * seconds)
        self.failure = StoreError(in_words(failure))  # itself it would keep all that it was raised through
        self._rests_until = time.monotonic() + (rest if rest >= LEAST_REST else 0.0)

    def works(self, sharing: Sharing, *, well: bool) -> None:
        """The store can be read; and, if all is well, nothing else is wrong with it."""
        self.known, self.sharing = True, sharing
        if well:
            self.faults, self._rests_until = FaultLog(), float("-inf")

    def leave(self, call: Call[Any], kind: Hashable) -> None:
        """An attempt of a kind was not waited for any longer."""
        with self._lock:
            self._late = (call, kind)

    def hangs(self) -> bool:
        """Whether an attempt that was left is still under way."""
        late = self._late
        return late is not None and late[0].thread.is_alive()

    def take(self, kind: Hashable) -> Call[Any] | None:
        """An attempt of this kind that was left and has come to its end since; it is the caller's then."""
        with self._lock:
            late = self._late
            if late is None or late[0].thread.is_alive():
                return None
            self._late = None
            return late[0] if late[1] == kind else None


_doors: OrderedDict[Hashable, Door] = OrderedDict()
_doors_of_stores: weakref.WeakKeyDictionary[Store, Door] = weakref.WeakKeyDictionary()
_lock = Lock()


def door_of(spec: StoreSpec | None) -> Door:
    """The door that everybody in this process uses who names a store so. Nothing is asked."""
    try:
        with _lock:
            if isinstance(spec, Store):
                return _doors_of_stores.setdefault(spec, Door())
            door = _doors.setdefault(_name(spec), Door())
            _doors.move_to_end(_name(spec))
            while len(_doors) > MOST_DOORS:
                _doors.popitem(last=False)
            return door
    except (TypeError, OSError, StoreError):  # it is no name of a store, or relative to a directory that is gone
        return Door()


def _name(spec: Any) -> Hashable:
    if spec is None:
        spec = environment.text_from(environment.STORE) or ""
    if isinstance(spec, (list, tuple)):
        return tuple(_name(one) for one in spec)
    if isinstance(spec, Tier):
        return (_name(spec.store), spec.write, spec.promote)
    if isinstance(spec, Store):
        return weakref.ref(spec)
    text = os.fspath(spec)
    directory = directory_of(text)
    where = str(directory.absolute()) if directory is not None else ""
    # There may be a password in it, which is secret.
    return hashlib.blake2b(f"{where}\n{'' if where and '?' not in text else text}".encode(), digest_size=16).digest()
