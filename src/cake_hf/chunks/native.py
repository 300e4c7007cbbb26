"""The codecs in C, where the library of `lossless.c` and `lossy/lossy.c` was built: one call per chunk, during which other
threads run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cake_hf.errors import CorruptChunk

if TYPE_CHECKING:
    from numpy.typing import NDArray  # brings much that nothing else needs

    Bytes = NDArray[np.uint8]
    Sizes = NDArray[np.int64]
Library = ctypes.CDLL

LIBRARY = Path(__file__).with_name("_native.so")
"""Made by `python scripts/build_native.py`, and by installing the package."""

ABI = 2
"""Of the library's functions. A library left over from another version is not used."""

AUTOMATIC, PORTABLE, VECTOR = 0, 1, 2
"""Variants of the kernels: AVX2 where the processor has it, or the portable ones."""

_FAULTS = {
    1: "has a wrong size",
    2: "has an unusable window",
    3: "has too few or too many escapes",
    5: "has scales that no encoder writes",
}
_NO_MEMORY = 4
_REFINEMENT_BLOCK, _REFINEMENT_BYTES = 512, 96
"""So many bytes of a piece have so many bytes of refinement."""


@cache
def library(path: Path = LIBRARY) -> Library | None:
    """Returns the library, or None if it was not built, does not fit this machine or is of another version."""
    try:
        loaded = ctypes.CDLL(str(path))
        if loaded.cake_abi() != ABI:
            return None
    except (OSError, AttributeError):
        return None
    choice: Any = ctypes.c_int
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int64
    scheme, outputs = [choice, choice, number, pointer, number], [pointer, number, pointer, number]
    loaded.cake_encode.argtypes = [choice, number, pointer, *outputs]
    loaded.cake_decode.argtypes = [choice, choice, number, pointer]
    loaded.cake_lossy_encode.argtypes = [choice, *scheme, number, pointer, *outputs]
    loaded.cake_lossy_decode.argtypes = [choice, *scheme, number, pointer]
    for function in (loaded.cake_encode, loaded.cake_decode, loaded.cake_lossy_encode, loaded.cake_lossy_decode):
        function.restype = number
    return loaded


def refuse(result: int) -> None:
    """Raises what a result of the library means.

    Raises:
        CorruptChunk: encoded bytes are wrong.
        MemoryError: there was none.
    """
    if result == 0:
        return
    number, fault = divmod(result, 256)
    if fault == _NO_MEMORY:
        raise MemoryError("There is no memory for the codec.")
    raise CorruptChunk(f"Encoded piece {number} {_FAULTS[fault]}.")


def addresses(parts: Sequence[memoryview]) -> list[int]:
    """Returns the addresses of writable, non-empty buffers."""
    address, byte = ctypes.addressof, ctypes.c_char
    return [address(byte.from_buffer(part)) for part in parts]


class NativeCodec:
    """The lossless codec: encodes and decodes the pieces of a chunk."""

    def __init__(self, loaded: Library, variant: int = AUTOMATIC) -> None:
        self._library = loaded
        self._variant = variant

    def encode(self, payload: Bytes, sizes: Sequence[int], channels: Sequence[int]) -> tuple[Bytes, Bytes, Sizes]:
        """See `NumpyCodec.encode`."""
        nbytes = np.array(sizes, np.int64)
        blocks = int((-(-nbytes // _REFINEMENT_BLOCK)).sum())
        bases, refinements = np.empty(payload.nbytes, np.uint8), np.empty(blocks * _REFINEMENT_BYTES, np.uint8)
        rows = np.zeros((len(nbytes), 5), np.int64)
        rows[:, 0] = payload.ctypes.data + nbytes.cumsum() - nbytes
        rows[:, 1] = nbytes
        rows[:, 2] = channels
        outputs = (bases.ctypes.data, bases.nbytes, refinements.ctypes.data, refinements.nbytes)
        refuse(self._library.cake_encode(self._variant, len(rows), rows.ctypes.data, *outputs))
        encoded = rows[:, 3:].copy()
        base_bytes, refinement_bytes = encoded.sum(0).tolist()
        return bases[:base_bytes], refinements[:refinement_bytes], encoded

    def decode(
        self, bases: Bytes, refinements: Bytes | None, sizes: Sizes, channels: Sizes, parts: Sequence[memoryview]
    ) -> None:
        """See `NumpyCodec.decode`."""
        rows = np.empty((len(parts), 7), np.int64)
        starts = sizes.cumsum(0) - sizes
        rows[:, 0] = bases.ctypes.data + starts[:, 0]
        rows[:, 2] = 0 if refinements is None else refinements.ctypes.data + starts[:, 1]
        rows[:, 1:4:2] = sizes
        rows[:, 4] = addresses(parts)
        rows[:, 5] = [part.nbytes for part in parts]
        rows[:, 6] = channels
        refuse(self._library.cake_decode(self._variant, refinements is None, len(rows), rows.ctypes.data))
