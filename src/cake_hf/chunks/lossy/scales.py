"""What the methods share: a power of two per piece, scales in float16, and codes of 2 or 4 bits in bytes.

A piece is first multiplied by the power of two that brings its largest number to between 2^13 and 2^14. This is exact, and
float16 then has room for everything in it: scales of small groups keep 11 bits down to 2^-28 of the largest number. All
products and sums that follow are multiples of 2^-24, so nothing becomes subnormal, and whether a thread flushes subnormal
numbers to zero does not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cake_hf.errors import CorruptChunk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cake_hf.chunks.lossy.method import Bytes, Numbers

TOP = 14
"""The largest number of a piece is brought below 2^TOP, the largest power of two in float16 being 2^15."""

SMALLEST, LARGEST = -80, 127
"""Of the exponents of a piece's largest number that are encoded: from 2^-81 to below 2^127. Others are stored as they are."""

Half = np.dtype("<f2")


class NotRepresentable(ValueError):
    """A piece cannot be encoded; it is stored as it is."""


def normalised(numbers: Numbers) -> tuple[Numbers, int]:
    """Returns the numbers times a power of two, and the exponent of the largest of them.

    Raises:
        NotRepresentable: they are all too small, and not all zero; or one is too large.
    """
    largest = int((numbers.view(np.uint32) & np.uint32(2**31 - 1)).max(initial=0))
    if not largest:
        return np.zeros_like(numbers), SMALLEST
    exponent = (largest >> 23) - 126
    if not SMALLEST <= exponent <= LARGEST:
        raise NotRepresentable
    return numbers * np.float32(2.0 ** (TOP - exponent)), exponent


def unnormalised(numbers: Numbers, exponent: int) -> Numbers:
    """Returns what `normalised` was given."""
    return numbers * np.float32(2.0 ** (exponent - TOP))


def half_below(numbers: Numbers) -> Numbers:
    """Returns the largest float16 that is not above each number, as float32."""
    near = numbers.astype(np.float16)
    return np.where(near.astype(np.float32) > numbers, np.nextafter(near, np.float16(-np.inf)), near).astype(np.float32)


def half_above(numbers: Numbers) -> Numbers:
    """Returns the smallest float16 that is not below each number, as float32."""
    return -half_below(-numbers)


def in_words(exponent: int, *arrays: Numbers) -> Bytes:
    """Returns an exponent and numbers that float16 has, as bytes."""
    parts = [np.array([exponent], "<i2").view(np.uint8)]
    return np.concatenate([*parts, *(one.astype(Half).reshape(-1).view(np.uint8) for one in arrays)])


def from_words(base: Bytes, *sizes: int) -> tuple[int, list[Numbers], Bytes]:
    """Returns the exponent, arrays of float32 of these sizes, and the bytes that follow them.

    Raises:
        CorruptChunk: there are fewer, or they are not as `in_words` writes them.
    """
    end = 2 + 2 * sum(sizes)
    if base.size < end:
        raise CorruptChunk("An encoded piece is shorter than its scales.")
    exponent = int(base[:2].view("<i2")[0])
    words = base[2:end].view(Half).astype(np.float32)
    if not SMALLEST <= exponent <= LARGEST or not bool(np.isfinite(words).all()):
        raise CorruptChunk("An encoded piece has scales that no encoder writes.")
    arrays, at = [], 0
    for size in sizes:
        arrays.append(words[at : at + size])
        at += size
    return exponent, arrays, base[end:]


def packed(codes: NDArray[np.uint8], bits: int) -> Bytes:
    """Returns codes of 2, 4 or 8 bits, in their order, from the lowest bits of each byte up."""
    flat, per = codes.reshape(-1), 8 // bits
    if per == 1:
        return flat
    if flat.size % per:
        flat = np.concatenate([flat, np.zeros(-flat.size % per, np.uint8)])
    columns = flat.reshape(-1, per)
    joined = columns[:, 0].copy()
    for number in range(1, per):
        joined |= columns[:, number] << np.uint8(bits * number)
    return joined


def unpacked(raw: Bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """Returns `count` codes from what `packed` returned.

    Raises:
        CorruptChunk: there are more or fewer bytes.
    """
    per = 8 // bits
    if raw.size != -(-count // per):
        raise CorruptChunk("An encoded piece has another number of codes than the model's KV.")
    if per == 1:
        return raw
    codes = np.empty((raw.size, per), np.uint8)
    for number in range(per):
        codes[:, number] = raw >> np.uint8(bits * number) & np.uint8(2**bits - 1)
    return codes.reshape(-1)[:count]
