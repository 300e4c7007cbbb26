"""The lossless codec in numpy, where there is no library of `lossless.c`: the same bytes, at a tenth of the speed or less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cake_hf.errors import CorruptChunk

if TYPE_CHECKING:
    from numpy.typing import NDArray  # brings much that nothing else needs

    Bytes = NDArray[np.uint8]
    Sizes = NDArray[np.int64]

MOST_CHANNELS = 2**20
_BLOCK, _LANES = 256, 32
_WINDOW, _ESCAPE, _LOWEST, _HIGHEST = 7, 7, 6, 254
_SAMPLED, _CANDIDATES = 64, 4
"""As in `lossless.c`, where these are explained."""


class NumpyCodec:
    """Encodes and decodes the pieces of a chunk."""

    def encode(self, payload: Bytes, sizes: Sequence[int], channels: Sequence[int]) -> tuple[Bytes, Bytes, Sizes]:
        """Returns the bases of all pieces, their refinements, and `[pieces, 2]` bytes of both.

        Args:
            payload: the pieces, back to back.
            sizes: bytes of each.
            channels: numbers per token of each; 0 if it is not bfloat16 and is left as it is.
        """
        pieces = np.split(payload, np.cumsum(sizes)[:-1])
        encoded = [_encoded(piece, count) for piece, count in zip(pieces, channels, strict=True)]
        bases, refinements = (np.concatenate(each) for each in zip(*encoded, strict=True))
        encoded_sizes = [(base.nbytes, refinement.nbytes) for base, refinement in encoded]
        return bases, refinements, np.array(encoded_sizes, np.int64)

    def decode(
        self, bases: Bytes, refinements: Bytes | None, sizes: Sizes, channels: Sizes, parts: Sequence[memoryview]
    ) -> None:
        """Decodes pieces into `parts`.

        Args:
            bases: of all these pieces, back to back.
            refinements: likewise; None to decode the bases alone.
            sizes: `[pieces, 2]` bytes of base and refinement, in sum those of `bases` and `refinements`.
            channels: numbers per token of each; 0 if its base is the piece itself.
            parts: writable, contiguous and not empty; where the pieces go.

        Raises:
            CorruptChunk: a piece is not as the encoder makes it. Some parts may have been written to.
        """
        cuts = sizes.cumsum(0)[:-1]
        each_base = np.split(bases, cuts[:, 0])
        each_rest = [None] * len(parts) if refinements is None else np.split(refinements, cuts[:, 1])
        for number, (base, rest, count, part) in enumerate(zip(each_base, each_rest, channels, parts, strict=True)):
            fault = _decode(base, rest, int(count), np.frombuffer(part, np.uint8))
            if fault:
                raise CorruptChunk(f"Encoded piece {number} {fault}.")


def _fits(nbytes: int, channels: int) -> bool:
    return 0 < channels <= MOST_CHANNELS and nbytes > 0 and nbytes % (2 * channels) == 0


def _refinement_bytes(numbers: int) -> int:
    return -(-numbers // _BLOCK) * 3 * _LANES


def _encoded(piece: Bytes, channels: int) -> tuple[Bytes, Bytes]:
    """Returns base and refinement; the piece itself and nothing if it would not shrink."""
    raw = piece, np.empty(0, np.uint8)
    numbers = piece.nbytes // 2
    room = piece.nbytes - 1 - channels - numbers - _refinement_bytes(numbers)
    if not _fits(piece.nbytes, channels) or room < 0:
        return raw
    x = _numbers(piece).reshape(-1, channels)
    exponents = (x >> 7).astype(np.uint8)
    tops = _chosen_windows(exponents)
    windowed = np.minimum(tops - exponents, np.uint8(_ESCAPE))
    escapes = exponents[windowed == _ESCAPE]
    if escapes.nbytes > room:
        return raw
    codes = (x >> 8).astype(np.uint8) & 0x80 | windowed << 4 | (x >> 3).astype(np.uint8) & 15
    low = np.zeros((-(-numbers // _BLOCK), 8, _LANES), np.uint8)
    low.reshape(-1)[:numbers] = (x & 7).astype(np.uint8).reshape(-1)
    packed = np.zeros((len(low), 3, _LANES), np.uint8)
    for s in range(8):
        packed[:, s // 4] |= (low[:, s] & 3) << 2 * (s & 3)
        packed[:, 2] |= low[:, s] >> 2 << s
    return np.concatenate([tops, codes.reshape(-1), escapes]), packed.reshape(-1)


def _chosen_windows(exponents: Bytes) -> Bytes:
    """Returns for each channel the largest exponent of its window, chosen by some of the tokens.

    Args:
        exponents: `[tokens, channels]`.
    """
    step = -(-len(exponents) // _SAMPLED)
    sample = exponents[step // 2 :: step].astype(np.int16)
    means = sample.sum(0, dtype=np.int64) // np.maximum(np.count_nonzero(sample, axis=0), 1)
    lowest = np.minimum(means + 1, _HIGHEST)
    below = [(lowest + above - sample) & 255 for above in range(_CANDIDATES)]
    counts = [np.count_nonzero(each < _WINDOW, axis=0) for each in below]
    best = np.argmax(counts, axis=0)  # the first of equal ones
    tops: Bytes = np.clip(lowest + best, _LOWEST, _HIGHEST).astype(np.uint8)
    return tops


def _decode(base: Bytes, rest: Bytes | None, channels: int, out: Bytes) -> str:
    """Decodes one piece; returns what is wrong with it, in words."""
    if not channels:
        if base.nbytes != out.nbytes:
            return "has a wrong size"
        out[:] = base
        return ""
    numbers = out.nbytes // 2
    if not _fits(out.nbytes, channels) or not channels + numbers <= base.nbytes:
        return "has a wrong size"
    if rest is not None and rest.nbytes != _refinement_bytes(numbers):
        return "has a wrong size"
    tops, codes, escapes = np.split(base, [channels, channels + numbers])
    if tops.min() < _LOWEST or tops.max() > _HIGHEST:
        return "has an unusable window"
    windowed = codes >> 4 & 7
    exponents = (tops - windowed.reshape(-1, channels)).reshape(-1)
    escaped = windowed == _ESCAPE
    if np.count_nonzero(escaped) != escapes.nbytes:
        return "has too few or too many escapes"
    exponents[escaped] = escapes
    low = _middle(exponents) if rest is None else _unpacked(rest)[:numbers]
    high_byte = codes & 0x80 | exponents >> 1
    low_byte = exponents << 7 | (codes & 15) << 3 | low
    out[0::2], out[1::2] = low_byte, high_byte
    return ""


def _middle(exponents: Bytes) -> Bytes:
    """Returns the three lowest mantissa bits of numbers decoded from the base alone."""
    return np.where((exponents == 0) | (exponents == 255), np.uint8(0), np.uint8(4))


def _unpacked(rest: Bytes) -> Bytes:
    packed = rest.reshape(-1, 3, _LANES)
    low = np.empty((len(packed), 8, _LANES), np.uint8)
    for s in range(8):
        low[:, s] = packed[:, s // 4] >> 2 * (s & 3) & 3 | (packed[:, 2] >> s & 1) << 2
    return low.reshape(-1)


def _numbers(piece: Bytes) -> NDArray[np.uint16]:
    return np.frombuffer(piece, "<u2").astype(np.uint16, copy=False)
