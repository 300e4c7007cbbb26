"""Lossy codecs: fewer bytes for KV that is close to what the model computed, by a definition of its own for each codec.

A cache with such a codec puts each full chunk through it before the next chunk sees it (`restore/forwards.py`), so what a chunk
decodes to *is* the KV of that cache's namespace. One file per method, in numpy, with every operation defined to the bit;
`lossy.c` does the same faster.
"""

from cake_hf.chunks.lossy.coding import LOSSY_DTYPES, code_chunk, decode_chunk, is_coded
from cake_hf.chunks.lossy.method import Method
from cake_hf.chunks.lossy.registry import LOSSY, is_lossy, lossy_method

__all__ = ["LOSSY", "LOSSY_DTYPES", "Method", "code_chunk", "decode_chunk", "is_coded", "is_lossy", "lossy_method"]
