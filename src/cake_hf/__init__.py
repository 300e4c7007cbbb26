"""cake_hf: a drop-in HuggingFace `Cache` that keeps the KV of long prompts and brings it back as fast as it can.

cache = CakeCache(model, store="~/.cache/cake_hf")
model.generate(**inputs, past_key_values=cache)
"""

from cake_hf.arithmetic.errors import CakeError, CorruptChunk, ForeignModel, StoreError, UnsupportedModel
from cake_hf.arithmetic.limits import Limits
from cake_hf.arithmetic.report import Report
from cake_hf.cache import CakeCache, generate
from cake_hf.stores import LocalStore, MemoryStore, Store, open_store

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
    "UnsupportedModel",
    "generate",
    "open_store",
]
