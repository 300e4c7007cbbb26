"""`CakeCache`, `generate` and the chat helpers: the public API, and what a cache holds between calls."""

from cake_hf.layers import compat  # noqa: F401  # isort: skip  # first: it refuses a transformers that is too old
from cake_hf.cache.cake_cache import CakeCache
from cake_hf.cache.chat import chat_document, chat_prompt
from cake_hf.cache.generate import generate

__all__ = ["CakeCache", "chat_document", "chat_prompt", "generate"]
