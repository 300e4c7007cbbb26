"""`quantspec`: 8 bits in two layers of 4, of which the upper one is a cache of its own.

R. Tiwari et al., QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache (arXiv 2502.10424):

    upper = round((x - lowest) / step), 0 to 15; lower = round((x - lowest - upper * step) / (step / 16)), -8 to 7
    x = lowest + (16 * upper + lower) * step / 16; from the upper bits alone, x = lowest + upper * step

in the groups of `int4`. A number is wrong by at most a sixteenth of a step, and by its dtype's rounding.

Bytes: the base has the exponent of the piece (int16), steps, lowest values (float16) and the upper codes; the refinement has
the lower codes, plus 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cake_hf.chunks.lossy.groups import Groups, places
from cake_hf.chunks.lossy.method import Method, Role, Shape
from cake_hf.chunks.lossy.native import LAYERED, Kernels
from cake_hf.chunks.lossy.scales import from_words, in_words, normalised, packed, unnormalised, unpacked

if TYPE_CHECKING:
    from cake_hf.chunks.lossy.method import Bytes, Numbers

SIZE, LEVELS = 32, 15


def _encode(numbers: Numbers, role: Role) -> tuple[Bytes, Bytes]:
    groups = Groups(Shape(*numbers.shape), role, SIZE, SIZE)
    scaled, exponent = normalised(numbers)
    split = groups.split(scaled)
    step, lowest = groups.bounds(split, LEVELS)
    upper: Numbers = np.clip(np.rint(places(split, step, lowest)), 0, LEVELS)
    lower = np.clip(np.rint(places(split - upper * step, step, lowest) * np.float32(16)), -8, 7) + np.float32(8)
    first, second = (packed(groups.joined(codes).astype(np.uint8), 4) for codes in (upper, lower))
    return np.concatenate([in_words(exponent, step, lowest), first]), second


def _decode(base: Bytes, refinement: Bytes, shape: Shape, role: Role) -> Numbers:
    lower = unpacked(refinement, 4, shape.tokens * shape.channels).astype(np.float32) - np.float32(8)
    return _decoded(base, shape, role, lower)


def _decode_base(base: Bytes, shape: Shape, role: Role) -> Numbers:
    return _decoded(base, shape, role, np.zeros(shape.tokens * shape.channels, np.float32))


def _decoded(base: Bytes, shape: Shape, role: Role, lower: Numbers) -> Numbers:
    groups = Groups(shape, role, SIZE, SIZE)
    exponent, (step, lowest), rest = from_words(base, groups.count, groups.count)
    upper = unpacked(rest, 4, shape.tokens * shape.channels).astype(np.float32)
    numbers = groups.split((upper * np.float32(16) + lower).reshape(shape))
    numbers *= groups.spread(unnormalised(step, exponent) / np.float32(16))
    numbers += groups.spread(unnormalised(lowest, exponent))
    return groups.joined(numbers)


QUANTSPEC = Method("quantspec", "1", _encode, _decode, _decode_base, Kernels(LAYERED, 4, SIZE))
