"""`int8`, `int4` and `kivi2`: whole numbers of 8, 4 or 2 bits in groups, `x = lowest + code * step` (KIVI, see `groups`).

    step = (largest - lowest) / (2^bits - 1), code = round((x - lowest) / step)

`int8` has one group of keys per channel of a chunk, and one of values per head and token. `int4` and `kivi2` have groups of 32.
A number is wrong by at most half a step, and by its dtype's rounding.

Bytes: exponent of the piece (int16), steps, lowest values (float16), codes in memory order.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cake_hf.chunks.lossy.groups import Groups, places
from cake_hf.chunks.lossy.method import Method, Role, Shape
from cake_hf.chunks.lossy.native import GROUPED, Kernels
from cake_hf.chunks.lossy.scales import from_words, in_words, normalised, packed, unnormalised, unpacked

if TYPE_CHECKING:
    from cake_hf.chunks.lossy.method import Bytes, Numbers


def _encode(bits: int, size: int, numbers: Numbers, role: Role) -> tuple[Bytes, Bytes]:
    levels, groups = 2**bits - 1, Groups(Shape(*numbers.shape), role, size, size)
    scaled, exponent = normalised(numbers)
    split = groups.split(scaled)
    step, lowest = groups.bounds(split, levels)
    codes = groups.joined(np.clip(np.rint(places(split, step, lowest)), 0, levels)).astype(np.uint8)
    return np.concatenate([in_words(exponent, step, lowest), packed(codes, bits)]), np.empty(0, np.uint8)


def _decode(bits: int, size: int, base: Bytes, refinement: Bytes, shape: Shape, role: Role) -> Numbers:
    groups = Groups(shape, role, size, size)
    exponent, (step, lowest), rest = from_words(base, groups.count, groups.count)
    codes = unpacked(rest, bits, shape.tokens * shape.channels).astype(np.float32).reshape(shape)
    step, lowest = unnormalised(step, exponent), unnormalised(lowest, exponent)
    numbers = groups.split(codes)
    numbers *= groups.spread(step)
    numbers += groups.spread(lowest)
    return groups.joined(numbers)


def _method(name: str, bits: int, size: int) -> Method:
    whole = Kernels(GROUPED, bits, size)
    return Method(name, "1", partial(_encode, bits, size), partial(_decode, bits, size), whole=whole)


INT8, INT4, KIVI2 = _method("int8", 8, 0), _method("int4", 4, 32), _method("kivi2", 2, 32)
