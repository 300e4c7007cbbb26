"""cake_hf: a drop-in HuggingFace `Cache` that keeps the KV of long prompts and brings it back as fast as it can.

cache = CakeCache(model, store="~/.cache/cake_hf")
model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cake_hf.arithmetic.errors import CakeError, CorruptChunk, ForeignModel, StoreError, UnsupportedModel
from cake_hf.arithmetic.limits import Limits
from cake_hf.arithmetic.report import Report
from cake_hf.cache import CakeCache, generate
from cake_hf.stores import LocalStore, MemoryStore, Store, Tier, TierStore, open_store

if TYPE_CHECKING:
    from cake_hf.people.packs import export_pack, import_pack, push_pack

__version__ = "0.1.0"

__all__ = [
    "CakeCache",
    "CakeError",
    "CorruptChunk",
    "ForeignModel",
    "Limits",
    "LocalStore",
    "MemoryStore",
    "Report",
    "Store",
    "StoreError",
    "Tier",
    "TierStore",
    "UnsupportedModel",
    "export_pack",
    "generate",
    "import_pack",
    "open_store",
    "push_pack",
]

_LATE = {"export_pack", "import_pack", "push_pack"}
"""Imported on first use: most people never share a pack, and its client libraries take longer to import than all else here."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cake_hf.people import packs

    return getattr(packs, name)
