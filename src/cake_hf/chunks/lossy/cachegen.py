"""`cachegen`: differences within groups of tokens, coarser in later layers, coded by how likely they are.

Y. Liu et al., CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving (arXiv 2310.07240).
Of ten consecutive tokens the first is the anchor and keeps 8 bits; of the others, the differences to the anchor as decoded are
kept. A step is a quarter, half or three quarters of a channel's standard deviation in the first, second or last third of the
layers. Steps and deviations are those of a chunk, and the codes of a channel are coded as a normal distribution, by the library
`constriction`. It is the smallest of our codecs and by far the slowest.

    code = round((x - anchor) / step), x = anchor + code * step

Bytes: exponent of the piece (int16); for each channel the largest anchor and the step (float16), and the deviations of its
anchors' and differences' codes (a byte each); then the words of the range coder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cake_hf.chunks.lossy.method import Method, Role, Shape
from cake_hf.chunks.lossy.scales import from_words, half_above, in_words, normalised, unnormalised
from cake_hf.errors import CorruptChunk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cake_hf.chunks.lossy.method import Bytes, Numbers

GROUP = 10
MOST = 127
"""Codes are whole numbers from -MOST to MOST."""

LEAST_SHARE = 32
"""A piece takes at least this part of the bytes that float32 would, so that no chunk decodes to memory without bounds."""


def _encode(numbers: Numbers, role: Role) -> tuple[Bytes, Bytes]:
    shape = Shape(*numbers.shape)
    scaled, exponent = normalised(numbers)
    flat = scaled.reshape(shape.tokens, shape.channels)
    mean = np.add.reduce(flat, 0) / np.float32(shape.tokens)
    spread = np.sqrt(np.add.reduce((flat - mean) ** 2, 0) / np.float32(shape.tokens))
    step = half_above(spread * np.float32(0.25 * (1 + min(2, int(role.depth * 3)))))
    largest = half_above(np.abs(flat[::GROUP]).max(0))
    anchors = np.rint(flat[::GROUP] * np.float32(MOST) / np.where(largest > 0, largest, np.float32(1)))
    differences = flat - _repeated(_anchors(anchors, largest), shape.tokens)
    codes = np.clip(np.rint(differences / np.where(step > 0, step, np.float32(1))), -MOST, MOST)
    others = _is_other(shape.tokens)
    deviations = [_deviation_codes(anchors), _deviation_codes(codes[others])]
    symbols = np.concatenate([anchors.reshape(-1), codes[others].reshape(-1)]).astype(np.int32)
    words = _range_encoded(symbols, _deviations(shape, *deviations))
    base = np.concatenate([in_words(exponent, largest, step), *deviations, words.astype("<u4").view(np.uint8)])
    missing = max(0, shape.tokens * shape.channels * 4 // LEAST_SHARE - base.size)
    return np.concatenate([base, np.zeros(-(-missing // 4) * 4, np.uint8)]), np.empty(0, np.uint8)


def _decode(base: Bytes, refinement: Bytes, shape: Shape, role: Role) -> Numbers:
    channels = shape.channels
    exponent, (largest, step), rest = from_words(base, channels, channels)
    if rest.size < 2 * channels or (rest.size - 2 * channels) % 4:
        raise CorruptChunk("An encoded piece is shorter than its scales.")
    deviations = _deviations(shape, rest[:channels], rest[channels : 2 * channels])
    symbols = _range_decoded(rest[2 * channels :].view("<u4").astype(np.uint32), deviations).astype(np.float32)
    count = -(-shape.tokens // GROUP)
    anchors = symbols[: count * channels].reshape(count, channels)
    numbers = _repeated(_anchors(anchors, largest), shape.tokens)
    numbers[_is_other(shape.tokens)] += symbols[count * channels :].reshape(-1, channels) * step
    return unnormalised(numbers.reshape(shape), exponent)


def _anchors(codes: Numbers, largest: Numbers) -> Numbers:
    return codes * largest / np.float32(MOST)


def _repeated(anchors: Numbers, tokens: int) -> Numbers:
    return np.repeat(anchors, GROUP, axis=0)[:tokens]


def _is_other(tokens: int) -> NDArray[np.bool_]:
    """Returns which tokens are no anchors."""
    others: NDArray[np.bool_] = np.arange(tokens) % GROUP != 0
    return others


def _deviation_codes(codes: Numbers) -> Bytes:
    """Returns the standard deviation of each channel's codes in a byte: 4 bits of mantissa, and an exponent from -5 up."""
    if not len(codes):
        return np.zeros(codes.shape[1], np.uint8)
    deviation = np.sqrt(np.add.reduce(codes * codes, 0) / np.float32(len(codes)))
    mantissa, exponent = np.frexp(np.clip(deviation, 2.0**-5, 255))
    found: Bytes = (((exponent + 4) << 4) + np.clip(np.rint(mantissa * 32) - 16, 0, 15)).astype(np.uint8)
    return found


def _deviations(shape: Shape, anchors: Bytes, others: Bytes) -> NDArray[np.float64]:
    """Returns the standard deviation of each symbol."""
    count = -(-shape.tokens // GROUP)
    rows = [np.tile(_deviation(codes), n) for codes, n in ((anchors, count), (others, shape.tokens - count))]
    return np.concatenate(rows)


def _deviation(codes: Bytes) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.ldexp((codes & 15) + 16.0, (codes >> 4).astype(np.int32) - 9)
    return found


def _range_encoded(symbols: NDArray[np.int32], deviations: NDArray[np.float64]) -> NDArray[np.uint32]:
    from constriction import stream

    coder = stream.queue.RangeEncoder()
    coder.encode(symbols, stream.model.QuantizedGaussian(-MOST, MOST), np.zeros_like(deviations), deviations)
    words: NDArray[np.uint32] = coder.get_compressed()
    return words


def _range_decoded(words: NDArray[np.uint32], deviations: NDArray[np.float64]) -> NDArray[np.int32]:
    from constriction import stream

    coder = stream.queue.RangeDecoder(words)
    try:
        symbols: NDArray[np.int32] = coder.decode(
            stream.model.QuantizedGaussian(-MOST, MOST), np.zeros_like(deviations), deviations
        )
    except (AssertionError, ValueError) as error:
        raise CorruptChunk(f"An encoded piece cannot be decoded ({type(error).__name__}).") from error
    return symbols


CACHEGEN = Method("cachegen", "1", _encode, _decode, library="constriction")
