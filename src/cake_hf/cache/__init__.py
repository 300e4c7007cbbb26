"""Floor 4: the cache itself. The only floor that knows transformers."""

from cake_hf.cache import compat  # noqa: F401  # first: it refuses a transformers that is too old
from cake_hf.cache.cake_cache import CakeCache
from cake_hf.cache.chat import chat_document, chat_prompt
from cake_hf.cache.generate import generate
from cake_hf.cache.strangers import reads_only

__all__ = ["CakeCache", "chat_document", "chat_prompt", "generate", "reads_only"]
