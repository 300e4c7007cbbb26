"""Lossy codecs: fewer bytes for KV that is close to what the model computed, by a definition of its own for each codec.

A cache with such a codec puts each full chunk through it before the next chunk sees it (`restore/forwards.py`), so what a chunk
decodes to *is* the KV of that cache's namespace. One file per method, in numpy, with every operation defined to the bit;
`lossy.c` does the same faster.
"""

from __future__ import annotations

from importlib.util import find_spec

from cake_hf.chunks.lossy.cachegen import CACHEGEN
from cake_hf.chunks.lossy.coding import LOSSY_DTYPES, code_chunk, decode_chunk, is_coded
from cake_hf.chunks.lossy.integers import INT4, INT8, KIVI2
from cake_hf.chunks.lossy.method import Method
from cake_hf.chunks.lossy.near import NEAR
from cake_hf.chunks.lossy.quantspec import QUANTSPEC
from cake_hf.chunks.lossy.rotation import ROT4
from cake_hf.errors import CakeError

__all__ = [
    "LOSSY",
    "LOSSY_DTYPES",
    "Method",
    "code_chunk",
    "decode_chunk",
    "is_coded",
    "is_lossy",
    "lossy_method",
    "version_of",
]

_METHODS = {method.name: method for method in (NEAR, INT8, QUANTSPEC, INT4, ROT4, CACHEGEN, KIVI2)}
LOSSY = tuple(_METHODS)
"""All names."""


def is_lossy(name: str) -> bool:
    """Returns whether a codec changes KV."""
    return name in _METHODS


def version_of(name: str) -> str | None:
    """Returns the version of the lossy codec with that name; None if there is none."""
    method = _METHODS.get(name)
    return None if method is None else method.version


def lossy_method(name: str) -> Method:
    """Returns the lossy codec with that name.

    Raises:
        KeyError: there is none.
        CakeError: it needs a library that is not installed.
    """
    method = _METHODS[name]
    if method.library and find_spec(method.library) is None:
        raise CakeError(f'The codec {name} needs {method.library}: pip install "cake-hf[{name}]"')
    return method
