"""A session's access to its store: opened within a time limit, replaced by none if that fails, and retried after a while.

A store is *known* if it was usable earlier in this process, or is a directory with a store in it. If a known store cannot be
used just now, or any store does not answer in time, that is not an error: the session continues without it. A store that never
was usable is the user's mistake, and raises.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cake_hf.errors import StoreError
from cake_hf.limits import Limits
from cake_hf.stores.base import Store, place_of
from cake_hf.stores.local import LocalStore
from cake_hf.stores.marker import BYTES, MARKER, NOTES, PARTIAL
from cake_hf.stores.opening import StoreSpec, directory_of, open_store
from cake_hf.stores.wrappers import AbsentStore
from cake_hf.transfer.deadline import Call, ask, in_words
from cake_hf.transfer.single_flight import Sharing, sharing_of
from cake_hf.transfer.store_retries import door_of
from cake_hf.transfer.writer import Writer
from cake_hf.util import environment
from cake_hf.util.forks import Lock

FLUSH_GRACE = 0.5
"""Seconds that a store may take beyond the time it was given to flush before it counts as hanging."""


@dataclass(frozen=True)
class Found:
    """The result of an attempt to open a store.

    Attributes:
        existed: whether the store is a directory that already had a store in it.
        store: the open store; None if opening failed.
        sharing: the state that the users of that place share.
        saves: whether new chunks may be saved.
        error: why the store cannot be opened, or cannot be written to.
        silent: whether there was no answer at all.
    """

    existed: bool = False
    store: Store | None = None
    place: Hashable = None
    sharing: Sharing | None = None
    saves: bool = False
    error: BaseException | None = None
    silent: bool = False


class Access:
    """Access to the store, what its users share, and the writer.

    Read these from here each time: they change when a store comes back.

    Args:
        spec: what the user named.
        save: whether new chunks are to be saved to the store.
        share: returns what all users of a store's place share.

    Attributes:
        store: the store in use; an empty one while there is none.
        sharing: the state that the users of the store's place share.
        writer: to the store.
        saves: whether new chunks may be saved.

    Raises:
        StoreError: the store never was usable, and is not now.
        Exception: whatever else the user's own store raises then.
    """

    store: Store
    sharing: Sharing
    writer: Writer
    saves: bool

    def __init__(
        self,
        spec: StoreSpec | None,
        limits: Limits,
        *,
        save: bool,
        share: Callable[[Store], Sharing] = sharing_of,
    ) -> None:
        self._spec = spec
        self._limits = limits
        self._save = save
        self._share = share
        self._door = door_of(spec)
        self._trying = Lock()
        found = self._open()
        if found.error is not None and not self._is_excused(found):
            if found.store is not None and found.store is not spec:
                ask(found.store.close, limits.exit_flush_seconds, "close")
            raise found.error if isinstance(found.error, Exception) else StoreError(in_words(found.error))
        self._take(found)

    @property
    def is_owned(self) -> bool:
        """Whether the store was opened here, and is to be closed here."""
        return self.store is not self._spec

    def reach(self) -> str:
        """Retries what failed, if it is time. Returns why there is no store, or an empty string if there is one."""
        failed, door = self._found.error is not None, self._door
        if failed and not door.rests() and not door.hangs() and self._trying.acquire(blocking=False):
            try:
                if self._found.store is None:
                    self._take(self._open())
                elif not (again := self._look_again()).silent:
                    self._take(again)
            finally:
                self._trying.release()
        return self._reason()

    def _reason(self) -> str:
        found = self._found
        if found.store is not None or found.error is None:
            return ""
        return f"the store cannot be used for now: {in_words(found.error)}"

    def flush(self, timeout: float | None) -> bool:
        """Waits until everything to be saved is durable; False on time-out, or if the store fails.

        Without a timeout it waits as long as chunks are being written: each chunk, and the store itself, may take
        `exit_flush_seconds`.
        """
        begin, most = time.monotonic(), self._limits.exit_flush_seconds
        if not self.writer.flush(timeout):
            if timeout is None:
                self._tell_unflushed(f"It has been at one chunk for more than {most:g} s (Limits.exit_flush_seconds).")
            return False
        if type(self.store).flush is Store.flush:
            return True
        left = most if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
        patience = min(left + FLUSH_GRACE, threading.TIMEOUT_MAX)
        answer = ask(partial(_flushed, self.store, left), patience, "flush", self.sharing.endings)
        if answer.error is not None:
            self._tell_unflushed(answer.trouble)
        elif timeout is None and not answer.value:
            self._tell_unflushed(f"It needs more than {most:g} s (Limits.exit_flush_seconds).")
        return bool(answer.value)

    def _tell_unflushed(self, why: str) -> None:
        self._door.faults.tell("flush", "The store cannot be flushed. %s", why)

    def close_store(self, seconds: float) -> None:
        """Closes the store if it was opened here and nothing is being written to it, and waits at most `seconds` for that."""
        if self.is_owned and self.writer.flush(0):
            answer = ask(self.store.close, max(0.0, seconds), "close", self.sharing.endings)
            if answer.error is not None:
                self._door.faults.tell("close", "The store cannot be closed. %s", answer.trouble)

    def forsake(self) -> None:
        """Works like `close_store`, and drops the writer. For finalizers: nothing in here waits or fails."""
        self.writer.retire()
        if self.is_owned and self.writer.flush(0) and not self.sharing.endings:
            with suppress(RuntimeError):  # the interpreter is exiting: the store is then not closed
                Call(self.store.close, "close").begin()

    def _open(self) -> Found:
        """Opens the store, unless it is known that the attempt would be futile just now."""
        door, kind = self._door, (self._limits, self._save)
        if door.hangs():
            return Found(
                error=StoreError(
                    "The store has not answered since it was to be opened; it is asked again once it has."
                ),
                silent=True,
            )
        call = door.take(kind)
        if call is None and door.known and door.rests():
            return Found(error=door.failure, silent=True)
        call = call or Call(partial(_find, self._spec, self._limits, self._share, save=self._save), "open")
        return self._await(call, kind)

    def _look_again(self) -> Found:
        """Checks whether the store, which can be read, can be written to by now."""
        return self._await(Call(partial(_with_refusal, self._found), "open"), None)

    def _await(self, call: Call[Found], kind: Hashable) -> Found:
        begin = time.monotonic()
        call.begin()
        try:
            answer = call.wait(self._limits.lookup_timeout)
        finally:
            if call.thread.is_alive():
                self._door.leave(call, kind)
        found = answer.value or Found(error=answer.error, silent=True)
        if found.error is not None:
            self._door.failed(found.error, time.monotonic() - begin)
        return found

    def _is_excused(self, found: Found) -> bool:
        """Returns whether a failure is no reason to raise: there was no answer, or the store is known."""
        return self._door.known or found.silent or (found.existed and _is_the_systems(found.error))

    def _take(self, found: Found) -> None:
        door, limits = self._door, self._limits
        if found.store is None and found.error is not None:
            why = in_words(found.error)
            door.faults.tell("open", "The store cannot be used for now, and prompts are computed. %s", why)
            self.store, self.sharing, self.saves = AbsentStore(why), Sharing(), False
        elif found.store is not None and found.sharing is not None:
            self.store, self.sharing, self.saves = found.store, found.sharing, found.saves
            door.works(found.sharing, well=found.error is None)
            if found.error is not None:
                door.faults.tell("save", "Chunks are not being saved (generation goes on). %s", in_words(found.error))
        capacity, seconds = limits.save_queue_bytes, limits.exit_flush_seconds
        self.writer = Writer(self.store, capacity, seconds, found.place, self.sharing.unsaved)
        self._found = found


def _find(spec: StoreSpec | None, limits: Limits, share: Callable[[Store], Sharing], *, save: bool) -> Found:
    """Opens a store; called in a thread of its own, because any of this may hang."""
    existed = False
    try:
        root = _directory(spec)
        existed = root is not None and _has_traces(root)
        store = open_store(spec, limits)
        found = Found(existed, store, place_of(store), share(store), saves=save and not store.read_only)
    except BaseException as error:
        return Found(existed, error=error)
    if found.saves:
        return _with_refusal(found)
    store.look_only()
    return found


def _with_refusal(found: Found) -> Found:
    """Returns the attempt's result, updated with the store's answer to whether it can be written to."""
    assert found.store is not None
    try:
        found.store.check_writable()
    except BaseException as error:
        return replace(found, saves=False, error=error)
    return replace(found, saves=True, error=None)


def _flushed(store: Store, seconds: float) -> bool:
    return bool(store.flush(seconds))


def _directory(spec: StoreSpec | None) -> Path | None:
    if isinstance(spec, LocalStore):
        return spec.root
    text = environment.text_from(environment.STORE) if spec is None else spec
    with suppress(StoreError):  # it names no store: opening it will say so
        return directory_of(os.fspath(text)) if isinstance(text, (str, os.PathLike)) else None
    return None


def _has_traces(root: Path) -> bool:
    """Returns whether a directory has been used as a store. This needs no file descriptors, in case none are left."""
    return any(os.path.exists(root / name) for name in (MARKER, PARTIAL, NOTES, BYTES))


def _is_the_systems(error: BaseException | None) -> bool:
    """Returns whether an error comes from the system, and not from what the user wrote."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None
