"""What a store is called before people: without secrets and without the way to it, and without asking it anything.

Reports are shown to others, in notebooks and in issues; where on a machine a directory is concerns nobody there.
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
    """The name of what `open_store` takes; of a directory its last part.

    Args:
        spec: of the store; None for the one that the environment names.
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
    except StoreError:  # opening it says what is wrong with it
        path = None
    if path is None and text.startswith("pack:"):
        return f"pack:{_last_part(Path(text.removeprefix('pack:')))}"
    return shown_url(text) if path is None else _last_part(path)


def _kind(store: Store) -> str:
    """What a store object is, with its place where that is one on a network."""
    # A store of the user's may do whatever it likes when it is asked how it looks.
    tells = type(store).__module__.startswith("cake_hf.") and type(store).__repr__ is not object.__repr__
    told = shown(repr(store)) if tells else ""
    return told if "://" in told else type(store).__name__


def _last_part(path: Path) -> str:
    return shown(path.name or path)
