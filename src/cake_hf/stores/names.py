"""What a store is called before people: without secrets, and without asking it anything."""

from __future__ import annotations

import os

from cake_hf.arithmetic import environment
from cake_hf.arithmetic.outside import shown, shown_url
from cake_hf.stores.base import Store
from cake_hf.stores.tier import Tier


def store_name(spec: object) -> str:
    """The name of what `open_store` takes.

    Args:
        spec: of the store; None for the one that the environment names.
    """
    if spec is None:
        return shown_url(environment.text_from(environment.STORE) or "")
    if isinstance(spec, (list, tuple)):
        return ", ".join(map(store_name, spec))
    if isinstance(spec, Tier):
        return store_name(spec.store)
    if isinstance(spec, os.PathLike):
        return shown(os.fspath(spec))
    if not isinstance(spec, Store):
        return shown_url(str(spec))
    # A store of the user's may do whatever it likes when it is asked how it looks.
    tells = type(spec).__module__.startswith("cake_hf.") and type(spec).__repr__ is not object.__repr__
    return shown(repr(spec)) if tells else type(spec).__name__
