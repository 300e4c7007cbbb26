"""cake_hf: a drop-in HuggingFace `Cache` that keeps the KV of long prompts and brings it back as fast as it can.

cache = CakeCache(model, store="~/.cache/cake_hf")
model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cake_hf.cache import CakeCache, chat_document, chat_prompt, generate
    from cake_hf.errors import CakeError, CorruptChunk, ForeignModel, StoreError, UnsupportedModel
    from cake_hf.limits import Limits
    from cake_hf.model.foreign_code import reads_only
    from cake_hf.packs import export_pack, import_pack, push_pack
    from cake_hf.plots import plot_split, plot_timeline, plot_ttft
    from cake_hf.report import Report
    from cake_hf.serving import batching, generate_batch
    from cake_hf.stores import LocalStore, MemoryStore, Store, Tier, TierStore, open_store

__version__ = "0.2.0"

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
    "batching",
    "chat_document",
    "chat_prompt",
    "export_pack",
    "generate",
    "generate_batch",
    "import_pack",
    "open_store",
    "plot_split",
    "plot_timeline",
    "plot_ttft",
    "push_pack",
    "reads_only",
]

_NAMES_OF = {
    "errors": ("CakeError", "CorruptChunk", "ForeignModel", "StoreError", "UnsupportedModel"),
    "limits": ("Limits",),
    "report": ("Report",),
    "cache": ("CakeCache", "chat_document", "chat_prompt", "generate"),
    "model.foreign_code": ("reads_only",),
    "packs": ("export_pack", "import_pack", "push_pack"),
    "plots": ("plot_split", "plot_timeline", "plot_ttft"),
    "serving": ("batching", "generate_batch"),
    "stores": ("LocalStore", "MemoryStore", "Store", "Tier", "TierStore", "open_store"),
}
"""Module -> what it gives to the package's face. Each is imported when it is first asked for: a program that only looks at the
version, or at an error's class, does not wait for torch."""

_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found  # the next one need not ask here
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
