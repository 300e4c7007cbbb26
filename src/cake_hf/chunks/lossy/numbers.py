"""Numbers of KV as float32 and back, with one rounding: to the nearest, and half-way cases to the even neighbour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from cake_hf.chunks.lossy.method import Bytes, Numbers


def to_float32(raw: Bytes, dtype: torch.dtype) -> Numbers:
    """Returns the numbers in a piece's bytes. Each number of these dtypes is one of float32, so nothing is rounded."""
    if dtype is torch.bfloat16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if dtype is torch.float16 else np.float32).astype(np.float32)


def from_float32(numbers: Numbers, dtype: torch.dtype) -> Bytes:
    """Returns the bytes of numbers rounded to a dtype; one that is too large for it becomes an infinity."""
    flat = np.ascontiguousarray(numbers).reshape(-1)
    if dtype is torch.bfloat16:
        bits = flat.view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16).view(np.uint8)
    if dtype is torch.float16:
        with np.errstate(over="ignore", under="ignore"):
            return flat.astype(np.float16).view(np.uint8)
    return flat.view(np.uint8)


def all_finite(raw: Bytes, dtype: torch.dtype) -> bool:
    """Returns whether no number in a piece's bytes is an infinity or a NaN."""
    if dtype is torch.float32:
        bits, exponents = raw.view(np.uint32), 0x7F800000
    else:
        bits, exponents = raw.view(np.uint16), 0x7F80 if dtype is torch.bfloat16 else 0x7C00
    return not bool(((bits & exponents) == exponents).any())
