"""Stores that go wrong in one method, at one moment, in one way; and stores that hang until a test is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cake_hf import Store
from cake_hf.testing import WrapperStore
from waiting import PATIENCE, await_true


class Panic(BaseException):
    """As a panic in native code: no `Exception`."""


class Faulty(WrapperStore):
    """Hands everything on to the store inside, but for one method.

    Args:
        inner: the store with the values.
        method: that goes wrong.
        fault: what it does instead: called with the method's name, it raises, hangs, or returns what the method shall.
        first: how many calls go well before that.
    """

    def __init__(self, inner: Store, method: str, fault: Callable[[str], Any], first: int = 0) -> None:
        super().__init__(inner)
        self.method = method
        self.fault: Callable[[str], Any] | None = fault
        self.left = first
        self.calls = 0
        self._counting = threading.Lock()

    def _goes_wrong(self, method: str) -> bool:
        if method != self.method or self.fault is None:
            return False
        with self._counting:
            self.calls += 1
            self.left -= 1
            return self.left < 0

    def contains(self, keys: Sequence[str]) -> Any:
        return self.fault("contains") if self._goes_wrong("contains") else super().contains(keys)

    def read(self, key: str) -> Any:
        return self.fault("read") if self._goes_wrong("read") else super().read(key)

    def read_into(self, key: str, parts: Sequence[memoryview]) -> Any:
        return self.fault("read_into") if self._goes_wrong("read_into") else super().read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> Any:
        return self.fault("read_range") if self._goes_wrong("read_range") else super().read_range(key, parts, offset)

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> Any:
        if self.method in ("read_into", "read_range"):
            return Store.read_gradually(self, key, parts, arrived)
        if self._goes_wrong("read_gradually"):
            return self.fault("read_gradually")
        return self.inner.read_gradually(key, parts, arrived)

    def write(self, key: str, parts: Sequence[Any], *, replace: bool = False) -> Any:
        return self.fault("write") if self._goes_wrong("write") else super().write(key, parts, replace=replace)

    def check_writable(self) -> Any:
        return self.fault("check_writable") if self._goes_wrong("check_writable") else super().check_writable()

    def mismatch_reason(self, namespace: str, facts: Any) -> Any:
        return (
            self.fault("mismatch_reason")
            if self._goes_wrong("mismatch_reason")
            else super().mismatch_reason(namespace, facts)
        )

    def notes_folder(self) -> Any:
        return self.fault("notes_folder") if self._goes_wrong("notes_folder") else super().notes_folder()

    def notes(self) -> Any:
        return self.fault("notes") if self._goes_wrong("notes") else super().notes()

    def put_note(self, name: str, note: bytes | None) -> Any:
        return self.fault("put_note") if self._goes_wrong("put_note") else super().put_note(name, note)

    def identity(self) -> Any:
        return self.fault("identity") if self._goes_wrong("identity") else super().identity()

    def flush(self, timeout: float | None = None) -> Any:
        return self.fault("flush") if self._goes_wrong("flush") else super().flush(timeout)

    def close(self) -> Any:
        return self.fault("close") if self._goes_wrong("close") else super().close()


METHODS = (
    "contains",
    "read_into",
    "read_range",
    "read_gradually",
    "write",
    "check_writable",
    "mismatch_reason",
    "notes_folder",
    "notes",
    "put_note",
    "identity",
    "flush",
    "close",
)


IDLE = ("cake-writer", "cake-tiers")
"""Threads that wait for work as long as somebody may bring some."""


class Hang:
    """A fault: its caller waits until `release`."""

    def __init__(self) -> None:
        self.begun = 0
        self._released = threading.Event()

    def __call__(self, *_: object, **__: object) -> Any:
        self.begun += 1
        self._released.wait(PATIENCE)
        raise TimeoutError("it hung")

    def release(self) -> None:
        self._released.set()


@contextmanager
def hanging() -> Iterator[Hang]:
    """A hang that ends with the body, as do the threads that hung."""
    before = set(threading.enumerate())
    hang = Hang()
    try:
        yield hang
    finally:
        hang.release()
        await_true(lambda: not [one for one in our_threads() - before if one.name not in IDLE])


def our_threads() -> set[threading.Thread]:
    """All threads of the library."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("cake-")}


def raising(make_error: Callable[[], BaseException]) -> Callable[..., Any]:
    """A fault that raises, each time a new error: one that was raised keeps what it went through."""

    def fault(*_: object) -> Any:
        raise make_error()

    return fault
