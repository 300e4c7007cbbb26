"""`rot4`: a random rotation of each head's vector, then 4 bits on the grid that is best for a normal distribution.

After a rotation, the numbers of a vector are spread about like a normal distribution, whatever they were before, and no outlier
takes the range of the others: S. Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456). The
rotation is that of a Hadamard matrix after a change of signs. Of keys, each channel's mean over the chunk is taken off before,
since biases would otherwise be most of what is rotated.

    y = H * signs * (x - mean), code = floor(y / (norm * STEP)) from -8 to 7, y = (code + 1/2) * norm * STEP

with `norm` the root mean square of a vector's y, and STEP that of the best uniform grid of 16 levels for a normal distribution
(J. Max, Quantizing for Minimum Distortion, 1960). A head dimension that is no power of two is cut into powers of two, the
largest first.

Bytes: exponent of the piece (int16), means of keys, norms (float16), codes plus 8 in memory order.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from cake_hf.chunks.lossy.method import Method, Role, Shape
from cake_hf.chunks.lossy.native import ROTATED, Kernels
from cake_hf.chunks.lossy.scales import from_words, in_words, normalised, packed, unnormalised, unpacked

if TYPE_CHECKING:
    from cake_hf.chunks.lossy.method import Bytes, Numbers

STEP = np.float32(0.3352)
_SIGNS = hashlib.sha256(b"cake_hf rot4").digest()


def _encode(numbers: Numbers, role: Role) -> tuple[Bytes, Bytes]:
    shape = Shape(*numbers.shape)
    scaled, exponent = normalised(numbers)
    means: list[Numbers] = []
    if not role.values:
        # `np.add.reduce` has no order for one channel.
        mean = (np.add.accumulate(scaled, 0)[-1] + np.float32(0)) / np.float32(shape.tokens)
        means = [mean.astype(np.float16).astype(np.float32)]
        scaled = scaled - means[0]
    turned = _turned(np.ascontiguousarray(scaled.reshape(-1, shape.head_dim).T) * _signs(shape.head_dim))
    norms = np.sqrt(_sum(turned * turned) / np.float32(shape.head_dim)).astype(np.float16).astype(np.float32)
    steps = np.where(norms > 0, norms, np.float32(1)) * STEP
    codes = (np.clip(np.floor(turned / steps), -8, 7) + np.float32(8)).astype(np.uint8).T
    return np.concatenate([in_words(exponent, *means, norms), packed(codes, 4)]), np.empty(0, np.uint8)


def _decode(base: Bytes, refinement: Bytes, shape: Shape, role: Role) -> Numbers:
    sizes = [] if role.values else [shape.channels]
    exponent, words, rest = from_words(base, *sizes, shape.tokens * shape.heads)
    codes = unpacked(rest, 4, shape.tokens * shape.channels).reshape(-1, shape.head_dim).T
    steps = words[-1] * STEP
    turned = _turned((np.ascontiguousarray(codes).astype(np.float32) - np.float32(7.5)) * steps)
    numbers = np.ascontiguousarray((turned * _signs(shape.head_dim)).T).reshape(shape)
    if not role.values:
        numbers = numbers + words[0].reshape(1, shape.heads, shape.head_dim)
    return unnormalised(numbers, exponent)


def _turned(numbers: Numbers) -> Numbers:
    """Returns an orthogonal, symmetric matrix, that of Hadamard for each part of the first axis, times `[head_dim, vectors]`.

    By sums and differences of pairs, whose order is defined; a matrix product's is not.
    """
    found, at = np.empty_like(numbers), 0
    for width in _parts(len(numbers)):
        part, half = numbers[at : at + width], 1
        while half < width:
            pairs = part.reshape(-1, 2, half, part.shape[1])
            part = np.empty_like(pairs)
            np.add(pairs[:, 0], pairs[:, 1], out=part[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=part[:, 1])
            part = part.reshape(width, -1)
            half *= 2
        np.multiply(part, np.float32(width**-0.5), out=found[at : at + width])
        at += width
    return found


def _sum(numbers: Numbers) -> Numbers:
    """Returns sums over the first axis in a defined order."""
    while (width := len(numbers)) > 1:
        half = width // 2
        joined = numbers[:half] + numbers[half : 2 * half]
        numbers = np.concatenate([joined, numbers[2 * half :]]) if width % 2 else joined
    found: Numbers = numbers[0]
    return found


@cache
def _parts(head_dim: int) -> tuple[int, ...]:
    """Returns the powers of two whose sum is the head dimension, the largest first."""
    return tuple(1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1)


@cache
def _signs(head_dim: int) -> Numbers:
    """Returns 1 or -1 for each number of a vector, `[head_dim, 1]`: the bits of a digest, again and again."""
    bits = np.unpackbits(np.frombuffer(_SIGNS, np.uint8))
    return (1 - 2 * np.resize(bits, (head_dim, 1)).astype(np.float32)).astype(np.float32)


ROT4 = Method("rot4", "1", _encode, _decode, whole=Kernels(ROTATED, 4, signs=_SIGNS), rounding="2")
