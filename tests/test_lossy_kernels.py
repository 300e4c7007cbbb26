"""The lossy codecs in C and in numpy: both encode to the same bytes and decode to the same numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import CorruptChunk
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import Encoded, EncodedSizes
from cake_hf.chunks.lossy import Method, code_chunk, decode_chunk, lossy_method
from cake_hf.chunks.lossy.native import Kernels
from cake_hf.chunks.native import AUTOMATIC, PORTABLE, library
from cake_hf.chunks.stored_forms import split

IN_C = ("int8", "int4", "kivi2", "quantspec", "rot4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ODD = {
    torch.bfloat16: [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x3F80],
    torch.float16: [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0xFC01, 0x3C00],
    torch.float32: [0, 2**31, 1, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800001, 0x3F800000],
}
"""Zeros, subnormal, least, largest and other numbers, infinities, NaN of several payloads."""


def by_pieces(name: str) -> Method:
    """A method in numpy alone."""
    return replace(lossy_method(name), whole=None)


def in_c(name: str, built: Path, variant: int) -> Method:
    method = lossy_method(name)
    assert isinstance(method.whole, Kernels)
    kernels = replace(method.whole, variant=variant, load=partial(library, built))
    return replace(method, whole=kernels)


def everywhere(name: str, built: Path) -> list[Method]:
    return [by_pieces(name), in_c(name, built, AUTOMATIC), in_c(name, built, PORTABLE)]


def coded(payload: bytes, layout: ChunkLayout, method: Method) -> tuple[bytes, bytes, EncodedSizes, bytes]:
    """Bases, refinements, sizes, and what the payload becomes."""
    room = bytearray(payload)
    encoded = code_chunk(memoryview(room), layout, method)
    return bytes(encoded.bases), bytes(encoded.refinements), encoded.sizes, bytes(room)


def decoded(bases: bytes, refinements: bytes, sizes: EncodedSizes, layout: ChunkLayout, method: Method) -> bytes:
    room = bytearray(b"\xa5" * layout.nbytes)
    decode_chunk(bases, refinements, sizes, layout, split(memoryview(room), layout), method)
    return bytes(room)


def layout_of(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> ChunkLayout:
    names = [(f"layers.{layer}.{what}", layer) for layer in range(2) for what in ("keys", "values")]
    return ChunkLayout(tokens, tuple(Piece(name, heads, dim, dtype, layer) for name, layer in names))


@st.composite
def chunks(draw: st.DrawFn) -> tuple[ChunkLayout, bytes]:
    """Layouts and numbers: usual KV, any bits, odd values, constants, and pieces of one exponent."""
    dtype = draw(st.sampled_from(DTYPES))
    tokens, heads = draw(st.integers(1, 70)), draw(st.integers(1, 3))
    dim = draw(st.sampled_from([1, 2, 3, 7, 16, 31, 32, 33, 40, 64, 96]))
    layout, random = layout_of(tokens, heads, dim, dtype), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["usual", "usual", "bits", "odd", "constant", "signs", "one odd"]))
    word = np.uint32 if dtype is torch.float32 else np.uint16
    count = layout.nbytes // dtype.itemsize
    if kind in ("usual", "one odd"):
        scales = np.exp(random.uniform(-2, 2, (1, heads, dim))) * 2.0 ** draw(st.integers(-14, 12))
        numbers = np.concatenate([random.standard_normal((tokens, heads, dim)) * scales for _ in layout.pieces])
        bits = torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy().reshape(-1).view(word).copy()
        if kind == "one odd":
            bits[random.integers(count)] = draw(st.sampled_from(ODD[dtype]))
    elif kind == "bits":
        bits = random.integers(0, 2 ** (8 * dtype.itemsize), count, word)
    elif kind == "odd":
        few = draw(st.lists(st.sampled_from(ODD[dtype]), min_size=1, max_size=4))
        bits = random.choice(np.array(few, word), count)
    elif kind == "constant":
        bits = np.full(count, draw(st.integers(0, 2 ** (8 * dtype.itemsize) - 1)), word)
    else:
        one = draw(st.integers(0, 2 ** (8 * dtype.itemsize - 1) - 1))
        bits = random.choice(np.array([one, one | 1 << (8 * dtype.itemsize - 1)], word), count)
    return layout, bits.tobytes()


@pytest.mark.parametrize("name", IN_C)
@settings(max_examples=120, deadline=None)
@given(chunk=chunks())
def test_c_and_numpy_make_the_same_bytes_and_read_them(
    name: str, built: Path, chunk: tuple[ChunkLayout, bytes]
) -> None:
    layout, payload = chunk
    methods = everywhere(name, built)
    [(bases, refinements, sizes, numbers)] = {coded(payload, layout, method) for method in methods}
    assert {decoded(bases, refinements, sizes, layout, method) for method in methods} == {numbers}


@pytest.mark.parametrize("name", IN_C)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_is_encoded_in_c(name: str, dtype: torch.dtype, built: Path) -> None:
    """So that what is compared above are not pieces that stay as they are. And bytes that differ are found."""
    layout = layout_of(128, 2, 64, dtype)
    numbers = torch.randn(4 * 128 * 2 * 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    payload = numbers.view(torch.uint8).numpy().tobytes()
    room, method = bytearray(payload), in_c(name, built, AUTOMATIC)
    assert method.whole is not None
    encoded = method.whole.encode(memoryview(room), layout)
    assert encoded is not None
    assert encoded.sizes.nbytes < 0.57 * len(payload)
    assert room != payload
    other = bytearray(payload)
    other[dtype.itemsize - 1] ^= 0x80  # the first number's sign
    assert coded(bytes(other), layout, by_pieces(name))[0] != bytes(encoded.bases)


@pytest.mark.parametrize("name", IN_C)
def test_where_nothing_was_built_numpy_does_it(name: str) -> None:
    method = lossy_method(name)
    assert isinstance(method.whole, Kernels)
    without = replace(method, whole=replace(method.whole, load=lambda: None))
    layout = layout_of(33, 2, 40, torch.float16)
    payload = np.random.default_rng(0).standard_normal(layout.nbytes // 2).astype(np.float16).tobytes()
    made = coded(payload, layout, without)
    assert made == coded(payload, layout, by_pieces(name))
    assert decoded(*made[:3], layout, without) == made[3]


@pytest.mark.parametrize("name", IN_C)
def test_flushed_subnormal_numbers_change_nothing_in_c(name: str, built: Path) -> None:
    """A loader's thread may flush them where the main thread does not."""
    layout = layout_of(40, 2, 48, torch.float32)
    numbers = np.random.default_rng(3).integers(0, 2**32, layout.nbytes // 4, np.uint32) & 0x807FFFFF
    numbers[::480] = 0x20000000  # a larger one in some groups: beside it, the others are not too small to be encoded
    method = in_c(name, built, AUTOMATIC)
    before = coded(numbers.tobytes(), layout, method)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        assert coded(numbers.tobytes(), layout, method) == before
        assert decoded(*before[:3], layout, method) == before[3]
    finally:
        torch.set_flush_denormal(False)
    assert before[2].nbytes < layout.nbytes
    assert before == coded(numbers.tobytes(), layout, by_pieces(name))


@pytest.mark.parametrize("name", IN_C)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_broken_bytes_are_refused_by_all_alike(name: str, built: Path, data: st.DataObject) -> None:
    """Or they decode to the same numbers, and nothing beyond the place is written to: see native_fuzz.c."""
    layout = layout_of(20, 2, 16, torch.bfloat16)
    payload = torch.randn(4 * 20 * 32, generator=torch.Generator().manual_seed(1)).bfloat16().view(torch.uint8).numpy()
    methods = everywhere(name, built)
    bases, refinements, sizes, _ = coded(payload.tobytes(), layout, methods[0])
    broken = bytearray(bases)
    for place in data.draw(st.lists(st.integers(0, len(bases) - 1), min_size=1, max_size=4)):
        broken[place] = data.draw(st.integers(0, 255))
    by = data.draw(st.sampled_from([0, 0, 0, -1, 1]))
    broken = broken[:by] if by < 0 else broken + bytes(by)
    moved = EncodedSizes((*sizes.bases[:-1], sizes.bases[-1] + by), sizes.refinements)
    assert len({outcome(bytes(broken), refinements, moved, layout, method) for method in methods}) == 1


def outcome(bases: bytes, refinements: bytes, sizes: EncodedSizes, layout: ChunkLayout, method: Method) -> bytes | None:
    """What is decoded, with one NaN for all; None if it is refused."""
    try:
        with np.errstate(all="ignore"):
            raw = decoded(bases, refinements, sizes, layout, method)
    except CorruptChunk:
        return None
    numbers = np.frombuffer(raw, np.uint16)
    return np.where((numbers & 0x7FFF) > 0x7F80, np.uint16(0x7FFF), numbers).tobytes()


def test_a_refinement_that_the_codec_does_not_have_is_refused(built: Path) -> None:
    layout = layout_of(20, 2, 16, torch.bfloat16)
    for method in everywhere("int8", built):
        bases, _, sizes, _ = coded(bytes(layout.nbytes), layout, method)
        wrong = EncodedSizes(sizes.bases, (3, 0, 0, 0))
        with pytest.raises(CorruptChunk):
            decoded(bases, b"abc", wrong, layout, method)


@pytest.mark.parametrize("name", IN_C)
def test_pieces_that_stay_as_they_are_are_mixed_with_others(name: str, built: Path) -> None:
    tokens = 32
    pieces = (
        Piece("layers.0.keys", 2, 16, torch.bfloat16),
        Piece("layers.0.values", 1, 8, torch.float64),
        Piece("layers.1.keys", 1, 7, torch.float32, 1),
        Piece("layers.2.keys", 2, 16, torch.bfloat16, 2, windowed=True),
    )
    layout = ChunkLayout(tokens, pieces)
    payload = np.random.default_rng(4).integers(0, 0x3F, layout.nbytes, np.uint8).tobytes()
    methods = everywhere(name, built)
    [made] = {coded(payload, layout, method) for method in methods}
    assert [made[2].is_raw(number, size) for number, size in enumerate(layout.sizes)] == [False, True, False, True]
    assert {decoded(*made[:3], layout, method) for method in methods} == {made[3]}
    [first] = {first_pieces(Encoded(memoryview(made[0]), memoryview(made[1]), made[2]), layout, m) for m in methods}
    assert first == made[3][: len(first)]


def first_pieces(encoded: Encoded, layout: ChunkLayout, method: Method) -> bytes:
    """The first two pieces alone."""
    sizes, room = encoded.sizes, bytearray(sum(layout.sizes[:2]))
    parts = [memoryview(room)[: layout.sizes[0]], memoryview(room)[layout.sizes[0] :]]
    bases = encoded.bases[: sum(sizes.bases[:2])]
    decode_chunk(bases, encoded.refinements[: sum(sizes.refinements[:2])], sizes, layout, parts, method)
    return bytes(room)


def test_memory_that_does_not_fit_is_the_callers_fault(built: Path) -> None:
    layout = layout_of(20, 2, 16, torch.bfloat16)
    for method in everywhere("int8", built):
        for payload in (memoryview(bytearray(layout.nbytes - 2)), memoryview(bytes(layout.nbytes))):
            with pytest.raises(ValueError, match="in place"):
                code_chunk(payload, layout, method)
        made = coded(bytes(layout.nbytes), layout, method)
        short = [memoryview(bytearray(size - 2)) for size in layout.sizes]
        with pytest.raises(ValueError, match="sizes and places"):
            decode_chunk(*made[:3], layout, short, method)


@settings(max_examples=80, deadline=None)
@given(chunk=chunks())
def test_near_is_the_same_for_whole_chunks(chunk: tuple[ChunkLayout, bytes]) -> None:
    layout, payload = chunk
    made = coded(payload, layout, lossy_method("near"))
    assert made == coded(payload, layout, by_pieces("near"))
    assert decoded(*made[:3], layout, lossy_method("near")) == decoded(*made[:3], layout, by_pieces("near")) == made[3]
