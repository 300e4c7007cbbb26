"""From what a user writes to a store: a path, a URL, or a store object as it is."""

from __future__ import annotations

import os
import re

from cake_hf.arithmetic.errors import StoreError
from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore
from cake_hf.stores.memory import MemoryStore

StoreSpec = Store | str | os.PathLike[str]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def open_store(spec: StoreSpec) -> Store:
    """Open a store.

    Args:
        spec: a directory path, `file:///path`, `memory:` or `memory:4GB`, or a `Store`, which is returned as it is.

    Raises:
        StoreError: an unknown URL scheme, or a path that cannot be a store.
    """
    if isinstance(spec, Store):
        return spec
    text = os.fspath(spec)
    if text in ("", "file://"):
        raise StoreError("The store path is empty; give a directory, such as ~/.cache/cake_hf.")
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "memory":
        return MemoryStore(_parse_bytes(rest)) if rest else MemoryStore()
    if colon and rest.startswith("//"):
        if scheme == "file":
            return LocalStore(rest.removeprefix("//"))
        raise StoreError(f"Unknown store URL {text!r}; known are a directory path, file:///path and memory:4GB.")
    return LocalStore(text)


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise StoreError(f"{text!r} is not a size; write it like 4GB or 512MiB.")
    if not (nbytes := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise StoreError(f"A store of {text!r} can hold nothing; give it a size like 4GB.")
    return nbytes
