"""What stands in for a store that cannot be used just now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cake_hf.errors import StoreError
from cake_hf.stores.base import Part, Store


class AbsentStore(Store):
    """Has nothing, and takes nothing.

    Args:
        why: what to say to who wants to write.
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
