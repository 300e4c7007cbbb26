"""A base class for wrappers around a store, and the stand-in for a store that cannot be used at the moment.

Wrappers that are slow or broken on purpose are in `cake_hf.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from cake_hf.errors import StoreError
from cake_hf.stores.base import Part, Store


class WrapperStore(Store):
    """Passes all calls on to the inner store; subclasses override what they change."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.reads_ranges = inner.reads_ranges
        self.range_seconds = inner.range_seconds
        self.read_only = inner.read_only
        self.in_memory = inner.in_memory

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return self.inner.contains(keys)

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        return self.inner.read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        return self.inner.read_range(key, parts, offset)

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> int | None:
        if type(self).read_into is WrapperStore.read_into:
            return self.inner.read_gradually(key, parts, arrived)
        return super().read_gradually(key, parts, arrived)  # the subclass's own `read_into` must be used

    def read_up_to(self, key: str, buffer: memoryview) -> int | None:
        if type(self).read_into is WrapperStore.read_into:
            return self.inner.read_up_to(key, buffer)
        return super().read_up_to(key, buffer)

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        return self.inner.write(key, parts, replace=replace)

    def delete(self, key: str) -> bool:
        return self.inner.delete(key)

    def keys(self) -> Iterator[str]:
        return self.inner.keys()

    def size(self, key: str) -> int | None:
        return self.inner.size(key)

    def check_writable(self) -> None:
        self.inner.check_writable()

    def head(self, key: str, nbytes: int) -> bytes | None:
        return self.inner.head(key, nbytes)

    def look_only(self) -> None:
        self.inner.look_only()

    def leaves_traces(self) -> bool:
        return self.inner.leaves_traces()

    def mismatch_reason(self, namespace: str, metadata: Callable[[], Mapping[str, Any]]) -> str:
        return self.inner.mismatch_reason(namespace, metadata)

    def notes(self) -> Mapping[str, bytes]:
        return self.inner.notes()

    def put_note(self, name: str, note: bytes | None) -> None:
        self.inner.put_note(name, note)

    def flush(self, timeout: float | None = None) -> bool:
        return self.inner.flush(timeout)

    def close(self) -> None:
        self.inner.close()


_FOR_TESTS = ("FAULTS", "FaultStore", "GateStore", "ThrottledStore", "expected_faults")
"""Names that were in this module once and can still be imported from it."""


def __getattr__(name: str) -> Any:
    if name in _FOR_TESTS:
        return getattr(import_module("cake_hf.testing"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AbsentStore(Store):
    """An empty store that refuses writes.

    Args:
        why: the message of the StoreError that writes raise.
    """

    read_only = True

    def __init__(self, why: str) -> None:
        self._why = why

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [False] * len(keys)

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        return None

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        raise StoreError(self._why)

    def delete(self, key: str) -> bool:
        raise StoreError(self._why)

    def keys(self) -> Iterator[str]:
        return iter(())

    def size(self, key: str) -> int | None:
        return None

    def check_writable(self) -> None:
        raise StoreError(self._why)
