"""Display names of stores: without secrets and without full paths, found without accessing the store.

Reports are shown to other people, in notebooks and issues, who need not know where on a machine a directory is.
"""

from __future__ import annotations

import os
from pathlib import Path

from cake_hf.errors import StoreError
from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore
from cake_hf.stores.opening import directory_of
from cake_hf.stores.tier import Tier
from cake_hf.util import environment
from cake_hf.util.redaction import shown, shown_url


def store_name(spec: object) -> str:
    """Returns the display name of a store's spec, as `open_store` takes it; for a directory, the last part of its path.

    Args:
        spec: spec of the store; None for the store that the environment names.
    """
    if spec is None:
        spec = environment.text_from(environment.STORE) or ""
    if isinstance(spec, (list, tuple)):
        return ", ".join(map(store_name, spec))
    if isinstance(spec, Tier):
        return store_name(spec.store)
    if isinstance(spec, LocalStore):
        return _last_part(spec.root)
    if isinstance(spec, Store):
        return _kind(spec)
    return _last_part(Path(spec)) if isinstance(spec, os.PathLike) else _named(str(spec))


def _named(text: str) -> str:
    try:
        path = directory_of(text)
    except StoreError:  # opening the store reports what is wrong
        path = None
    if path is None and text.startswith("pack:"):
        return f"pack:{_last_part(Path(text.removeprefix('pack:')))}"
    return shown_url(text) if path is None else _last_part(path)


def _kind(store: Store) -> str:
    """Returns the kind of a store object, with its place if that is on a network."""
    # The repr of a user's own store may do anything, so only ours is called.
    tells = type(store).__module__.startswith("cake_hf.") and type(store).__repr__ is not object.__repr__
    told = shown(repr(store)) if tells else ""
    return told if "://" in told else type(store).__name__


def _last_part(path: Path) -> str:
    return shown(path.name or path)
