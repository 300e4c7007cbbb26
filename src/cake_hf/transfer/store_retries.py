"""Remembers, for each store that a user names, whether it was ever usable, and when to try it again."""

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
from cake_hf.transfer.single_flight import Sharing
from cake_hf.transfer.telemetry import FaultLog
from cake_hf.util import environment
from cake_hf.util.forks import Lock, renewed_in_child

REST_FACTOR, LEAST_REST, MOST_REST = 10.0, 1.0, 60.0
"""After a failure, a store is left alone for this many times as long as the failure took. A store that keeps prompts waiting is
thus rarely retried, but no later than after the last number of seconds; a store that fails at once is retried with the next
prompt."""

MOST_DOORS = 1024
"""Maximum number of store names that are remembered."""


class Door:
    """The state of one name of a store. Get it from `door_of`.

    Attributes:
        known: whether the store was usable earlier in this process.
        faults: already logged; forgotten when all is well again.
        sharing: what the store's users share, kept between them: the next user knows what hangs.
        failure: the error of the last failed attempt.
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
        """Returns whether it is too early to try again."""
        return time.monotonic() < self._rests_until

    def failed(self, failure: BaseException, seconds: float) -> None:
        """Records that an attempt failed after that many seconds."""
        rest = min(MOST_REST, REST_FACTOR * seconds)
        self.failure = StoreError(in_words(failure))  # the exception itself would keep its traceback's frames alive
        self._rests_until = time.monotonic() + (rest if rest >= LEAST_REST else 0.0)

    def works(self, sharing: Sharing, *, well: bool) -> None:
        """Records that the store can be read and, if all is well, that nothing else is wrong with it."""
        self.known, self.sharing = True, sharing
        if well:
            self.faults, self._rests_until = FaultLog(), float("-inf")

    def leave(self, call: Call[Any], kind: Hashable) -> None:
        """Records that an attempt of that kind is no longer waited for."""
        with self._lock:
            self._late = (call, kind)

    def hangs(self) -> bool:
        """Returns whether an attempt that is no longer waited for is still under way."""
        late = self._late
        return late is not None and late[0].thread.is_alive()

    def take(self, kind: Hashable) -> Call[Any] | None:
        """Returns an attempt of this kind that was left and has ended since; it then belongs to the caller."""
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
    """Returns the door shared by everything in this process that names a store this way. Asks the store nothing."""
    try:
        with _lock:
            if isinstance(spec, Store):
                return _doors_of_stores.setdefault(spec, Door())
            door = _doors.setdefault(_name(spec), Door())
            _doors.move_to_end(_name(spec))
            while len(_doors) > MOST_DOORS:
                _doors.popitem(last=False)
            return door
    except (TypeError, OSError, StoreError):  # not a name of a store, or relative to a directory that is gone
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
    # Hashed, because the text may contain a password.
    return hashlib.blake2b(f"{where}\n{'' if where and '?' not in text else text}".encode(), digest_size=16).digest()
