"""Stores, which hold the chunks: one contract (`base`), and one file per kind of store."""

from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore
from cake_hf.stores.memory import MemoryStore
from cake_hf.stores.opening import open_store
from cake_hf.stores.tier import Tier
from cake_hf.stores.tiers import TierStore

__all__ = ["LocalStore", "MemoryStore", "Store", "Tier", "TierStore", "open_store"]
