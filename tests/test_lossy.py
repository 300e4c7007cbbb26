"""The lossy codecs by themselves: what each of them promises about single pieces."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import CorruptChunk
from cake_hf.chunks.codec import ChunkMetadata, checksums, parse_header
from cake_hf.chunks.encoded_checks import check_encoded_file
from cake_hf.chunks.encoded_header import MOST_MODEL_BYTES, encoded_header_size, parse_encoded_header
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import Encoded, rounded
from cake_hf.chunks.lossy import LOSSY, code_chunk, lossy_method
from cake_hf.chunks.stored_forms import decode_file, file_of, raw_file, split

NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "cachegen" and not find_spec("constriction"), reason="no library")
    )
    for name in LOSSY
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(128, 2, 64), (32, 1, 32), (33, 3, 40), (7, 2, 96), (100, 1, 1), (16, 5, 13), (1, 2, 128), (64, 1, 576)]
"""Tokens, heads, head_dim: full groups, and numbers that no group, byte or rotation divides."""

KEY = "ab" * 20
FORMATS = Path(__file__).parent / "data" / "formats"


def layout_of(shape: tuple[int, int, int], dtype: torch.dtype, layers: int = 1) -> ChunkLayout:
    """Keys and values of that shape in each layer."""
    tokens, heads, dim = shape
    names = [(f"layers.{n}.{what}", n) for n in range(layers) for what in ("keys", "values")]
    return ChunkLayout(tokens, tuple(Piece(name, heads, dim, dtype, n) for name, n in names))


def payload_of(*pieces: torch.Tensor) -> memoryview:
    return memoryview(bytearray(b"".join(piece.contiguous().view(torch.uint8).numpy().tobytes() for piece in pieces)))


def numbers_in(payload: memoryview, layout: ChunkLayout) -> list[torch.Tensor]:
    tokens = layout.chunk_size
    return [
        torch.frombuffer(bytearray(part), dtype=piece.dtype).view(tokens, piece.heads, piece.head_dim)
        for piece, part in zip(layout.pieces, split(payload, layout), strict=True)
    ]


@cache
def kv(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, bias: float = 0.0) -> tuple[torch.Tensor, ...]:
    """Keys and values: keys with channels of their own size and, if wanted, biases, values without."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape, generator=random) * torch.rand((1, *shape[1:]), generator=random).mul(3).exp()
    keys = keys + bias * torch.randn((1, *shape[1:]), generator=random)
    return keys.to(dtype), torch.randn(shape, generator=random).to(dtype)


def coded(
    name: str, *pieces: torch.Tensor, layout: ChunkLayout | None = None
) -> tuple[list[torch.Tensor], Encoded, ChunkLayout]:
    """What the pieces become."""
    if layout is None:
        layout = layout_of(tuple(pieces[0].shape), pieces[0].dtype)  # type: ignore[arg-type]
    payload = payload_of(*pieces)
    encoded = code_chunk(payload, layout, lossy_method(name))
    return numbers_in(payload, layout), encoded, layout


def file_bytes(name: str, encoded: Encoded, layout: ChunkLayout, payload: memoryview) -> bytes:
    facts = ChunkMetadata(KEY, KEY, 3, KEY, "a model", checksums(payload, layout))
    return b"".join(file_of(encoded, layout, facts, name))


# What a chunk decodes to.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stored_chunk_decodes_to_what_is_in_the_cache(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    pieces, encoded, layout = coded(name, *kv(shape, dtype))
    raw = file_bytes(name, encoded, layout, payload_of(*pieces))
    assert check_encoded_file(raw, KEY, deep=True).codec == name
    parts = [memoryview(bytearray(size)) for size in layout.sizes]
    decode_file(memoryview(raw), KEY, layout, parts)
    for piece, part in zip(pieces, parts, strict=True):
        assert bytes(part) == bytes(payload_of(piece))
    assert bytes(raw_file(raw, KEY))[-layout.nbytes :] == bytes(payload_of(*pieces))
    assert parse_encoded_header(raw)[1].tensor_table == layout.tensor_table


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_give_the_same_bytes(name: str) -> None:
    pieces = kv((40, 2, 48), torch.bfloat16)
    first, again = (coded(name, *pieces)[1] for _ in range(2))
    assert bytes(first.bases) == bytes(again.bases)
    assert bytes(first.refinements) == bytes(again.refinements)


@pytest.mark.parametrize("name", NAMES)
def test_flushed_subnormal_numbers_change_nothing(name: str) -> None:
    """Whether a thread flushes them is its own affair, and loaders are other threads."""
    pieces = tuple(piece * 2.0**-60 for piece in kv((40, 2, 48), torch.float32))
    before = coded(name, *pieces)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        after = coded(name, *pieces)
    finally:
        torch.set_flush_denormal(False)
    assert bytes(before[1].bases) == bytes(after[1].bases)
    assert all(map(torch.equal, before[0], after[0]))


SIZES = {"near": 0.52, "int8": 0.54, "quantspec": 0.57, "int4": 0.32, "rot4": 0.28, "cachegen": 0.34, "kivi2": 0.20}
"""Of the bytes of bfloat16 KV, for chunks of 128 tokens with heads of 64."""


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str) -> None:
    _, encoded, layout = coded(name, *kv((128, 4, 64), torch.bfloat16))
    assert encoded.sizes.nbytes / layout.nbytes <= SIZES[name]


# How wrong it is.


def steps(exact: torch.Tensor, values: bool, size: int, levels: int) -> torch.Tensor:
    """The step of each number's group, from its definition."""
    tokens, heads, dim = exact.shape
    numbers = exact.double()
    rows = numbers.reshape(tokens * heads if not size else tokens, -1) if values else numbers.reshape(tokens, -1).T
    size = size or rows.shape[1]
    found = torch.cat(
        [
            (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)).expand_as(part) / levels
            for part in rows.split(size, dim=1)
        ],
        dim=1,
    )
    return (found if values else found.T).reshape(tokens, heads, dim)


GROUPED = {"int8": (0, 255, 2), "int4": (32, 15, 2), "kivi2": (32, 3, 2), "quantspec": (32, 15, 16)}
"""Size of groups (0: a channel of the chunk, or a head), steps in a group, and which part of a step is the largest error."""


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [0.0, 30.0])
def test_bounds_of_errors(name: str, dtype: torch.dtype, shape: tuple[int, int, int], bias: float) -> None:
    exact = kv(shape, dtype, 1, bias)
    size, levels, part = GROUPED[name]
    for piece, found, values in zip(exact, coded(name, *exact)[0], (False, True), strict=True):
        numbers = piece.double()
        largest = numbers.abs().max()
        # Steps and lowest values are rounded to 11 bits, outwards; the result to the dtype.
        step = steps(piece, values, size, levels) * (1 + 2**-9) + (numbers.abs().amax() * 2**-10) / levels
        rounding = numbers.abs() * torch.finfo(dtype).eps + largest * 2**-20
        assert ((found.double() - numbers).abs() <= step / part + rounding).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_near_is_the_rounding_of_the_lossless_codecs_base(shape: tuple[int, int, int]) -> None:
    for piece, found in zip(kv(shape, torch.bfloat16), coded("near", *kv(shape, torch.bfloat16))[0], strict=True):
        assert torch.equal(found, rounded(piece)) or torch.equal(found, piece)  # as it is, if it would not shrink
    for piece, found in zip(kv(shape, torch.float32), coded("near", *kv(shape, torch.float32))[0], strict=True):
        assert torch.equal(found, rounded(piece.bfloat16()).float()) or torch.equal(found, piece)


@pytest.mark.parametrize(
    ("name", "least"),
    [("near", 30.0), ("int8", 40.0), ("quantspec", 40.0), ("int4", 19.0), ("rot4", 19.0), ("kivi2", 7.0)],
)
@pytest.mark.parametrize("bias", [0.0, 30.0])
def test_signal_over_noise(name: str, least: float, bias: float) -> None:
    """In decibels, of what differs between tokens: biases are no signal."""
    shape = (128, 4, 64)
    exact = kv(shape, torch.float32, 2, bias)
    for piece, found in zip(exact, coded(name, *exact)[0], strict=True):
        signal = (piece - piece.mean(0)).pow(2).mean((0, 2)).double()
        noise = (found - piece).pow(2).mean((0, 2)).double()
        if name == "near" and bias:
            continue  # its error follows the numbers, biases included
        assert (10 * (signal / noise).log10()).min() > least


@pytest.mark.skipif(not find_spec("constriction"), reason="no library")
def test_cachegen_is_coarser_in_later_layers() -> None:
    layout = layout_of((60, 2, 32), torch.float32, layers=6)
    pieces = [piece for _ in range(6) for piece in kv((60, 2, 32), torch.float32)]
    found, encoded, _ = coded("cachegen", *pieces, layout=layout)
    noise = [(piece - other).pow(2).mean().item() for piece, other in zip(pieces, found, strict=True)][::2]
    assert noise[0] == noise[1] < noise[2] == noise[3] < noise[4] == noise[5]
    assert encoded.sizes.bases[0] > encoded.sizes.bases[4] > encoded.sizes.bases[8]


def test_quantspecs_base_is_a_coarser_cache() -> None:
    method, shape = lossy_method("quantspec"), (64, 2, 32)
    exact = kv(shape, torch.float32)[0].numpy()
    from cake_hf.chunks.lossy.method import Role, Shape

    base, refinement = method.encode(exact, Role(values=False))
    assert method.decode_base is not None
    coarse = method.decode_base(base, Shape(*shape), Role(values=False))
    fine = method.decode(base, refinement, Shape(*shape), Role(values=False))
    assert 10 < np.abs(coarse - exact).max() / np.abs(fine - exact).max() < 30
    assert np.array_equal(coarse, coded("int4", torch.from_numpy(exact), torch.from_numpy(exact))[0][0].numpy())


# What is not encoded.


@pytest.mark.fault("KV", "KV has infinities or NaN, and the codec is lossy.", "The piece is stored as it is, exactly.")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_as_it_is(name: str, dtype: torch.dtype, odd: float) -> None:
    keys, values = (piece.clone() for piece in kv((32, 2, 16), dtype))
    keys[3, 1, 5] = odd
    found, encoded, layout = coded(name, keys, values)
    assert bytes(payload_of(found[0])) == bytes(payload_of(keys))
    assert encoded.sizes.is_raw(0, layout.sizes[0])
    assert not torch.equal(found[1], values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 2.0**-130), (torch.bfloat16, 2.0**-130), (torch.float32, 2.0**-90)]
)
def test_what_is_too_small_stays_as_it_is(name: str, dtype: torch.dtype, size: float) -> None:
    if name == "near":
        pytest.skip("it has no scales")
    small = (kv((32, 2, 16), torch.float32)[1].clamp(-1, 1) * size).to(dtype)
    found, _, _ = coded(name, small, small)
    assert bytes(payload_of(found[0])) == bytes(payload_of(small))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(name: str, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    piece = (torch.linspace(-1, 1, 32 * 32).view(32, 2, 16).double() * most).to(dtype)
    for found in coded(name, piece, piece)[0]:
        assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -3.75])
def test_constant_pieces(name: str, number: float) -> None:
    piece = torch.full((40, 2, 32), number, dtype=torch.bfloat16)
    for found in coded(name, piece, piece)[0]:
        # A rotation makes something else of it.
        assert (found.float() - number).abs().max() <= abs(number) * (0.5 if name == "rot4" else 1 / 16)


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_and_windows_stay_as_they_are(name: str) -> None:
    pieces = tuple(piece.to(torch.float64) for piece in kv((32, 2, 16), torch.float32))
    assert all(map(torch.equal, coded(name, *pieces)[0], pieces))
    exact = kv((32, 2, 16), torch.float32)
    layout = ChunkLayout(
        32, (Piece("layers.0.keys", 2, 16, torch.float32), Piece("layers.1.keys", 2, 16, torch.float32, 1, True))
    )
    found, _, _ = coded(name, *exact, layout=layout)
    assert not torch.equal(found[0], exact[0])
    assert torch.equal(found[1], exact[1])


BITS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_bits_round_trip(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Whatever is in a piece: what is stored decodes to what is in the cache, which is finite where the piece is."""
    tokens, heads, dim = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 40)))
    words = st.lists(BITS, min_size=1, max_size=12)
    pool, seed = data.draw(words), data.draw(st.integers(0, 99))
    whole = np.random.default_rng(seed).choice(np.array(pool, np.uint32), 2 * tokens * heads * dim).view(np.uint8)
    layout = layout_of((tokens, heads, dim), dtype)
    payload = memoryview(bytearray(whole.tobytes()[: layout.nbytes]))
    exact = numbers_in(payload, layout)
    encoded = code_chunk(payload, layout, lossy_method(name))
    raw = file_bytes(name, encoded, layout, payload)
    check_encoded_file(raw, KEY, deep=True)
    for piece, found in zip(exact, numbers_in(payload, layout), strict=True):
        if piece.isfinite().all():
            assert found.isfinite().all()
        else:
            assert bytes(payload_of(piece)) == bytes(payload_of(found))
    if name == "near" and dtype is torch.bfloat16:  # the one that promises it
        again = memoryview(bytearray(payload))
        code_chunk(again, layout, lossy_method(name))
        assert bytes(again) == bytes(payload)


# What is wrong with the bytes.


@pytest.mark.fault(
    "KV", "Encoded bytes of a lossy codec are such as no encoder writes, with the right checksums.", "A damaged chunk."
)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_no_encoder_writes_are_refused(name: str) -> None:
    """With checksums that are right for them."""
    _, encoded, layout = coded(name, *kv((32, 2, 16), torch.float32))
    random, size = np.random.default_rng(5), encoded.sizes.bases[0]
    seen = set()
    for change in range(60):
        bases = bytearray(encoded.bases)
        if change % 3 == 0:
            bases[:2] = [0xFF, 0x7F]  # the exponent, or two tops
        elif change % 3 == 1:
            bases[2:4] = [0xFF, 0xFF]  # the first scale
        else:
            bases[:size] = random.bytes(size)
        changed = Encoded(memoryview(bases), encoded.refinements, encoded.sizes)
        raw = file_bytes(name, changed, layout, memoryview(bytearray(layout.nbytes)))
        parts = [memoryview(bytearray(size)) for size in layout.sizes]
        try:
            decode_file(memoryview(raw), KEY, layout, parts)
        except CorruptChunk:
            seen.add(change % 3)
    assert seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", [-1, 1, 7])
def test_pieces_of_other_lengths_are_refused(name: str, by: int) -> None:
    from cake_hf.chunks.lossless import EncodedSizes

    _, encoded, layout = coded(name, *kv((32, 2, 16), torch.float32))
    bases, sizes = bytearray(encoded.bases), encoded.sizes
    end = sizes.bases[0]
    bases[end + min(0, by) : end] = bytes(max(0, by))
    moved = Encoded(
        memoryview(bases), encoded.refinements, EncodedSizes((end + by, *sizes.bases[1:]), sizes.refinements)
    )
    raw = file_bytes(name, moved, layout, memoryview(bytearray(layout.nbytes)))
    with pytest.raises(CorruptChunk):
        decode_file(memoryview(raw), KEY, layout, [memoryview(bytearray(size)) for size in layout.sizes])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["m", "m" * 999, "\u6f22" * 300])
def test_headers_are_as_long_as_their_layout_says(name: str, model: str) -> None:
    for layers in (1, 30):
        layout = layout_of((16, 1, 64), torch.bfloat16, layers)
        pieces = [piece for _ in range(layers) for piece in kv((16, 1, 64), torch.bfloat16)]
        found, encoded, _ = coded(name, *pieces, layout=layout)
        facts = ChunkMetadata(KEY, KEY, 10**12, KEY, model, checksums(payload_of(*found), layout))
        header = file_of(encoded, layout, facts, name)[0]
        assert len(header) == encoded_header_size(layout)
        assert len(parse_encoded_header(header)[0].facts.model.encode()) <= MOST_MODEL_BYTES


# What was stored by this version.


@pytest.mark.parametrize("name", NAMES)
def test_checked_in_chunks_stay_readable(name: str) -> None:
    """Each is what its codec makes of the KV of version-2.safetensors. If decoding fails, raise the codec's version."""
    plain = (FORMATS / "version-2.safetensors").read_bytes()
    facts, table = parse_header(plain)
    raw = (FORMATS / f"{name}.safetensors").read_bytes()
    metadata, layout = parse_encoded_header(raw)
    assert (metadata.codec, metadata.facts.key, layout.tensor_table) == (name, facts.key, table)
    check_encoded_file(raw, facts.key, deep=True)
    payload = memoryview(bytearray(plain[len(plain) - layout.nbytes :]))
    encoded = code_chunk(payload, layout, lossy_method(name))
    again = file_of(encoded, layout, replace(facts, checksums=checksums(payload, layout)), name)
    assert b"".join(again) == raw


TIE = torch.full((256, 1, 1), 2.0**-25).index_fill(0, torch.tensor([0]), 1 + 2.0**-11)
"""One channel, whose mean is half way between two float16 numbers if it is summed in order."""
ZEROS = torch.tensor([0.0, -0.0, -1.5, -0.0, 0.0, 2.5, -0.0, 0.0]).repeat(512).view(256, 2, 8)
ROUNDED = {
    "near": ("1", "879e47af4880c9fc"), "int8": ("1", "430f87440c909ad5"), "quantspec": ("1", "54b83ae20c909ad5"),
    "int4": ("1", "54b83ae20c909ad5"), "rot4": ("2", "b22d1d980c909ad5"), "cachegen": ("1", "ab1274d30c909ad5"),
    "kivi2": ("1", "a396f7d40c909ad5"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_numbers_become_what_the_keys_say(name: str) -> None:
    """In C or not, and on any machine. If the second part changes, raise the first: the codec's `rounding`."""
    pieces = (Piece("layers.0.keys", 1, 1, torch.float32), Piece("layers.1.keys", 2, 8, torch.float32, 1))
    layout, payload = ChunkLayout(256, pieces), payload_of(TIE, ZEROS)
    code_chunk(payload, layout, lossy_method(name))
    assert (lossy_method(name).rounding, "".join(one[:8] for one in checksums(payload, layout))) == ROUNDED[name]
