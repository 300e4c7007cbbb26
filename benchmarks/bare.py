"""Reads a file with nothing else around it: no reader can be faster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cake_hf.errors import CakeError


def read_file(path: str | Path, parts: Sequence[memoryview]) -> None:
    """Fills the parts from a file, by one `preadv`.

    Raises:
        CakeError: the file is shorter.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done, whole = os.preadv(descriptor, parts, 0), sum(part.nbytes for part in parts)
    finally:
        os.close(descriptor)
    if done != whole:
        raise CakeError(f"A bare read of {path} brought {done} of {whole} bytes.")
