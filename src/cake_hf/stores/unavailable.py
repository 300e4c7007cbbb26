"""A stand-in for a store that cannot be used at the moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cake_hf.errors import StoreError
from cake_hf.stores.base import Part, Store


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
