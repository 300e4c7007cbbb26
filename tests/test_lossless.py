"""The lossless codec: every bit comes back, whichever encoder wrote it, and broken bytes are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cake_hf import CorruptChunk
from cake_hf.chunks import native
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import (
    Codec,
    Encoded,
    EncodedSizes,
    decode_base_into,
    decode_into,
    encode,
    rounded,
)
from cake_hf.chunks.lossless_numpy import NumpyCodec
from cake_hf.chunks.native import AUTOMATIC, PORTABLE, NativeCodec, library

BLOCK = 256
SPECIAL = [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF]
"""Zeros, subnormal and extreme numbers, infinities, NaN of several payloads."""


CODECS: dict[str, Callable[[Path], Codec]] = {
    "native": lambda path: NativeCodec(loaded(path), AUTOMATIC),
    "portable": lambda path: NativeCodec(loaded(path), PORTABLE),
    "numpy": lambda path: NumpyCodec(),
}


def loaded(path: Path) -> native.Library:
    found = library(path)
    assert found is not None
    return found


@pytest.fixture(params=list(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    """One of the three; that in numpy needs no compiler."""
    name: str = request.param
    return NumpyCodec() if name == "numpy" else CODECS[name](request.getfixturevalue("built"))


@pytest.fixture
def codecs(built: Path) -> list[Codec]:
    return [make(built) for make in CODECS.values()]


def layout_of(tokens: int, *widths: int, dtype: torch.dtype = torch.bfloat16) -> ChunkLayout:
    pieces = [Piece(f"layers.{n}.keys", 1, width, dtype, n) for n, width in enumerate(widths)]
    return ChunkLayout(tokens, tuple(pieces))


def places(layout: ChunkLayout) -> list[memoryview]:
    return [memoryview(bytearray(b"\xa5" * size)) for size in layout.sizes]


def payload_of(numbers: NDArray[np.uint16]) -> bytes:
    return numbers.astype("<u2").tobytes()


def kv(tokens: int, width: int, seed: int = 0) -> bytes:
    """Like KV: each channel has a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(width, generator=generator).exp2()
    return bytes_of((torch.randn(tokens, width, generator=generator) * scales).to(torch.bfloat16))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def encoded_parts(encoded: Encoded) -> tuple[bytes, bytes, EncodedSizes]:
    return bytes(encoded.bases), bytes(encoded.refinements), encoded.sizes


def decoded(encoded: Encoded, layout: ChunkLayout, codec: Codec) -> bytes:
    parts = places(layout)
    decode_into(encoded.bases, encoded.refinements, encoded.sizes, layout, parts, codec=codec)
    return b"".join(parts)


def decoded_base(encoded: Encoded, layout: ChunkLayout, codec: Codec) -> bytes:
    parts = places(layout)
    decode_base_into(encoded.bases, encoded.sizes, layout, parts, codec=codec)
    return b"".join(parts)


@st.composite
def odd_numbers(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """Tokens, channels and the numbers: any bits, windows of any width and place, special values, constants, and mixtures."""
    tokens, width = (
        draw(st.integers(1, 140)),
        draw(st.sampled_from([1, 2, 3, 7, 31, 32, 33, 64, 192, 255, 256, 257, 600])),
    )
    source = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = source.integers(0, 2**16, (tokens, width), np.uint16)
    kind = draw(st.sampled_from(["bits", "window", "window", "special", "constant"]))
    if kind == "window":
        first, span = draw(st.integers(0, 255)), draw(st.integers(1, 12))
        exponents = (first + np.arange(width) % 9 + source.integers(0, span, bits.shape)) & 255
        bits = (bits & 0x807F) | (exponents.astype(np.uint16) << 7)
        outside = source.random(bits.shape) < draw(st.sampled_from([0.0, 0.01, 0.3]))
        bits = np.where(outside, source.integers(0, 2**16, bits.shape, np.uint16), bits)
    elif kind == "special":
        bits = source.choice(np.array(SPECIAL, np.uint16), bits.shape)
    elif kind == "constant":
        bits = np.full_like(bits, draw(st.integers(0, 2**16 - 1)))
    return tokens, width, payload_of(bits)


@settings(max_examples=150, deadline=None)
@given(numbers=odd_numbers())
def test_all_codecs_make_the_same_bytes_and_read_them(built: Path, numbers: tuple[int, int, bytes]) -> None:
    tokens, width, payload = numbers
    layout, codecs = layout_of(tokens, width), [make(built) for make in CODECS.values()]
    encodeds = [encode(payload, layout, each) for each in codecs]
    assert len({encoded_parts(encoded) for encoded in encodeds}) == 1
    assert {decoded(encodeds[0], layout, each) for each in codecs} == {payload}
    [near] = {decoded_base(encodeds[0], layout, each) for each in codecs}
    tensor = torch.frombuffer(bytearray(payload), dtype=torch.bfloat16)
    assert near == (bytes_of(rounded(tensor)) if encodeds[0].sizes.refinements[0] else payload)


@settings(max_examples=40, deadline=None)
@given(numbers=odd_numbers())
def test_it_never_grows(numbers: tuple[int, int, bytes]) -> None:
    tokens, width, payload = numbers
    encoded = encode(payload, layout_of(tokens, width), NumpyCodec())
    assert encoded.sizes.nbytes == len(encoded.bases) + len(encoded.refinements) <= len(payload)
    encoded.sizes.check(layout_of(tokens, width))


@pytest.mark.parametrize(("tokens", "width"), [(128, 192), (512, 192), (128, 1024), (512, 576), (37, 96)])
def test_kv_shrinks(codec: Codec, tokens: int, width: int) -> None:
    layout, payload = layout_of(tokens, width), kv(tokens, width)
    encoded = encode(payload, layout, codec)
    assert decoded(encoded, layout, codec) == payload
    assert encoded.sizes.nbytes < 0.72 * len(payload)
    assert encoded.sizes.base_bytes < 0.53 * len(payload)


def test_each_exponent_comes_back(codec: Codec) -> None:
    """All 65,536 numbers, in channels whose windows lie at each possible place."""
    window = np.arange(256, dtype=np.uint16)[None] << 7  # the channel's own number is its exponent
    usual = np.repeat(window, 5000, 0) | np.arange(5000, dtype=np.uint16)[:, None] & 0x7F
    payload = payload_of(np.concatenate([usual, np.arange(2**16, dtype=np.uint16).reshape(256, 256)]))
    layout = layout_of(5256, 256)
    encoded = encode(payload, layout, codec)
    assert encoded.sizes.refinements != (0,)
    assert decoded(encoded, layout, codec) == payload


@pytest.mark.parametrize("disturbed", ["zeros", "a zero channel", "huge tokens", "infinities and NaN"])
def test_kv_with_unusual_numbers_in_it_shrinks(codec: Codec, disturbed: str) -> None:
    tensor = torch.frombuffer(bytearray(kv(128, 96)), dtype=torch.bfloat16).view(128, 96)
    match disturbed:
        case "zeros":
            tensor[torch.rand(128, 96, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
        case "a zero channel":
            tensor[:, ::3] = 0
        case "huge tokens":
            tensor[[0, 77]] *= 2**20
        case "infinities and NaN":
            tensor[::9, ::9], tensor[::7, 5] = float("inf"), float("nan")
    layout, payload = layout_of(128, 96), bytes_of(tensor)
    encoded = encode(payload, layout, codec)
    assert decoded(encoded, layout, codec) == payload
    assert encoded.sizes.nbytes < 0.88 * len(payload)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_stay_as_they_are(codec: Codec, dtype: torch.dtype) -> None:
    layout = ChunkLayout(
        32, (Piece("a", 2, 16, dtype), Piece("b", 2, 16, torch.bfloat16, 1), Piece("c", 1, 5, dtype, 2))
    )
    payload = b"".join([bytes(layout.sizes[0]), kv(32, 32), b"\x01" * layout.sizes[2]])
    encoded = encode(payload, layout, codec)
    raw, coded, _ = encoded.sizes.refinements
    assert raw == 0 < coded
    assert encoded.sizes.bases[0] == layout.sizes[0]
    assert decoded(encoded, layout, codec) == payload
    assert decoded_base(encoded, layout, codec)[: layout.sizes[0]] == payload[: layout.sizes[0]]


def test_what_does_not_shrink_stays_as_it_is(codec: Codec) -> None:
    noise = np.random.default_rng(1).integers(0, 2**16, (64, 64), np.uint16)
    layout, payload = layout_of(64, 64, 64), payload_of(noise) + kv(64, 64)
    encoded = encode(payload, layout, codec)
    assert encoded.sizes.refinements[0] == 0 < encoded.sizes.refinements[1]
    assert bytes(encoded.bases[: 64 * 64 * 2]) == payload_of(noise)
    assert decoded(encoded, layout, codec) == payload


@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 2), (2, 1), (1, 0), (0, 4)])
def test_a_part_of_the_pieces(codec: Codec, first: int, count: int) -> None:
    layout = ChunkLayout(
        40, tuple(Piece(str(n), 2, 24, torch.float16 if n == 1 else torch.bfloat16, n) for n in range(4))
    )
    payload = b"".join(kv(40, 48, seed) for seed in range(4))
    encoded = encode(payload, layout, codec)
    span = slice(first, first + count)
    bases, refinements = (
        data[sum(sizes[:first]) : sum(sizes[: first + count])]
        for data, sizes in ((encoded.bases, encoded.sizes.bases), (encoded.refinements, encoded.sizes.refinements))
    )
    parts = places(layout)[span]
    decode_into(bases, refinements, encoded.sizes, layout, parts, first, codec)
    size = layout.sizes[0]
    assert b"".join(parts) == payload[first * size : (first + count) * size]


def test_read_only_bytes_and_odd_addresses(codec: Codec) -> None:
    layout, payload = layout_of(30, 40), kv(30, 40)
    encoded = encode(memoryview(b"x" + payload)[1:], layout, codec)
    bases, refinements = memoryview(b"x" + encoded.bases)[1:], memoryview(b"x" + encoded.refinements)[1:]
    place = bytearray(len(payload) + 2)
    decode_into(bases, refinements, encoded.sizes, layout, [memoryview(place)[1:-1]], codec=codec)
    assert place == b"\0" + payload + b"\0"


# Broken bytes.


@pytest.mark.fault(
    "KV",
    "An encoded chunk has other bytes than the encoder makes, and its checksum fits.",
    "It is refused, or decodes to other numbers; nothing beyond its place is read or written.",
)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_broken_bytes_are_refused_by_all_alike(built: Path, data: st.DataObject) -> None:
    layout = layout_of(data.draw(st.integers(5, 40)), data.draw(st.sampled_from([5, 32, 70])))
    encoded = encode(kv(layout.chunk_size, layout.channels[0]), layout, NumpyCodec())
    bases, refinements = bytearray(encoded.bases), bytearray(encoded.refinements)
    for _ in range(data.draw(st.integers(1, 4))):
        bases[data.draw(st.integers(0, len(bases) - 1))] = data.draw(st.integers(0, 255))
    longer = data.draw(st.sampled_from([0, 0, 1, -1, 9]))
    bases = bases[:longer] if longer < 0 else bases + bytes(longer)
    sizes = EncodedSizes((len(bases),), encoded.sizes.refinements)
    outcomes = set()
    for make in CODECS.values():
        parts = places(layout)
        try:
            decode_into(bases, refinements, sizes, layout, parts, codec=make(built))
            outcomes.add(bytes(parts[0]))
        except CorruptChunk as error:
            outcomes.add(str(error))
    assert len(outcomes) == 1


def one_coded(layout: ChunkLayout) -> tuple[bytearray, bytearray, EncodedSizes]:
    encoded = encode(kv(layout.chunk_size, layout.channels[0]), layout, NumpyCodec())
    assert encoded.sizes.bases[0] > layout.channels[0] + layout.nbytes // 2  # it has escapes
    return bytearray(encoded.bases), bytearray(encoded.refinements), encoded.sizes


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("an escape less", "escapes"),
        ("an escape more", "escapes"),
        ("all escapes gone", "escapes"),
        ("a code that asks for an escape", "escapes"),
        ("a code that asks for none", "escapes"),
        ("a window too low", "window"),
        ("a window too high", "window"),
        ("a base that ends in its codes", "size"),
        ("a base of nothing", "size"),
        ("a refinement too short", "size"),
        ("a refinement too long", "size"),
    ],
)
@pytest.mark.fault(
    "KV", "An encoded piece has a wrong length, window or code.", "It is refused, and the chunk is computed."
)
def test_what_no_encoder_writes_is_refused(codec: Codec, broken: str, told: str) -> None:
    layout = layout_of(64, 40)
    bases, refinements, _ = one_coded(layout)
    codes, escapes = 40, 40 + 64 * 40
    usual = next(n for n in range(codes, escapes) if bases[n] & 0x70 != 0x70)
    escaped = next(n for n in range(codes, escapes) if bases[n] & 0x70 == 0x70)
    match broken:
        case "an escape less":
            del bases[-1]
        case "an escape more":
            bases.append(100)
        case "all escapes gone":
            del bases[escapes:]
        case "a code that asks for an escape":
            bases[usual] |= 0x70
        case "a code that asks for none":
            bases[escaped] &= 0x8F
        case "a window too low":
            bases[3] = 5
        case "a window too high":
            bases[3] = 255
        case "a base that ends in its codes":
            del bases[escapes - 1 :]
        case "a base of nothing":
            bases.clear()
        case "a refinement too short":
            del refinements[-96:]
        case "a refinement too long":
            refinements += bytes(96)
    sizes = EncodedSizes((len(bases),), (len(refinements),))
    with pytest.raises(CorruptChunk, match=told):
        decode_into(bases, refinements, sizes, layout, places(layout), codec=codec)


@pytest.mark.parametrize(
    ("bases", "refinements"),
    [((-1,), (5,)), ((10,), (-5,)), ((2**62,), (2**62,)), ((10,), (0,)), ((0,), (10,)), ((), ()), ((9, 9), (9, 9))],
)
def test_sizes_that_cannot_be_are_refused(codec: Codec, bases: tuple[int, ...], refinements: tuple[int, ...]) -> None:
    layout, sizes = layout_of(16, 8), EncodedSizes(bases, refinements)
    with pytest.raises(CorruptChunk):
        sizes.check(layout)
    with pytest.raises((CorruptChunk, ValueError)):
        decode_into(bytes(20), bytes(20), sizes, layout, places(layout), codec=codec)


def test_a_raw_piece_of_another_size_is_refused(codec: Codec) -> None:
    layout = layout_of(16, 8, dtype=torch.float16)
    for size in (0, 1, layout.nbytes - 1, layout.nbytes + 1):
        with pytest.raises(CorruptChunk, match="size"):
            decode_into(bytes(size), b"", EncodedSizes((size,), (0,)), layout, places(layout), codec=codec)


def test_the_wrong_payload_or_places_are_the_callers_fault() -> None:
    layout = layout_of(16, 8)
    with pytest.raises(ValueError, match="layout"):
        encode(bytes(layout.nbytes - 1), layout)
    encoded = encode(bytes(layout.nbytes), layout)
    with pytest.raises(ValueError, match="layout"):
        decode_into(encoded.bases, encoded.refinements, encoded.sizes, layout, [memoryview(bytearray(4))])


# The rounding of the base.


def test_the_rounding_is_the_middle_of_its_step() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    near = rounded(bits.view(torch.bfloat16))
    assert torch.equal(rounded(near).view(torch.int16), near.view(torch.int16))
    values, usual = bits.view(torch.bfloat16).float(), (bits >> 7 & 255 != 255) & (bits >> 7 & 255 != 0)
    error = ((near.float() - values).abs() / values.abs())[usual]
    assert error.max() <= 2**-5
    zeros = torch.tensor([0.0, -0.0, float("inf"), float("-inf")], dtype=torch.bfloat16)
    assert torch.equal(rounded(zeros).view(torch.int16), zeros.view(torch.int16))
    assert rounded(torch.tensor([float("nan")], dtype=torch.bfloat16)).isnan().all()
