"""An encoded chunk at rest (format version 3): readable by everyone, of a bounded size, and refused when any bit is wrong."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from cake_hf import CorruptChunk
from cake_hf.chunks.codec import (
    ALIGNMENT,
    ChunkMetadata,
    check_file,
    checksum,
    checksums,
    header_size,
    parse_header,
)
from cake_hf.chunks.codec import encode_header as encode_header_of_version_2
from cake_hf.chunks.encoded_checks import check_encoded, check_encoded_file, describe
from cake_hf.chunks.encoded_header import (
    EncodedMetadata,
    check_encoded_header,
    encode_header,
    encoded_header_size,
    is_encoded,
    most_stored_bytes,
    parse_encoded_header,
)
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import EncodedSizes, decode_base_into, decode_into, encode, rounded

KEY, PARENT, SPACE = "0a" * 20, "1b" * 20, "2c" * 20
DATA = Path(__file__).parent / "data" / "formats"
LAYOUT = ChunkLayout(
    24,
    (
        Piece("layers.0.keys", 2, 8, torch.bfloat16),
        Piece("layers.0.values", 2, 6, torch.bfloat16),
        Piece("layers.1.keys", 2, 8, torch.float32, 1),
        Piece("layers.1.values", 1, 20, torch.bfloat16, 1),
    ),
)


def kv(layout: ChunkLayout, seed: int = 0) -> bytes:
    """A payload of numbers like KV."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        torch.randn(layout.chunk_size, piece.heads, piece.head_dim, generator=generator).to(piece.dtype)
        for piece in layout.pieces
    ]
    return b"".join(bytes_of(piece) for piece in pieces)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def described(layout: ChunkLayout, payload: bytes, model: str = "a model") -> tuple[EncodedMetadata, bytes]:
    """A chunk's metadata, and its encoded payload."""
    encoded = encode(payload, layout)
    facts = ChunkMetadata(KEY, PARENT, 3, SPACE, model, checksums(payload, layout))
    return describe(facts, encoded), bytes(encoded.bases) + bytes(encoded.refinements)


def chunk_file(layout: ChunkLayout = LAYOUT, model: str = "a model") -> bytes:
    metadata, payload = described(layout, kv(layout), model)
    return encode_header(layout, metadata) + payload


RAW = chunk_file()


def header_of(raw: bytes) -> str:
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode().rstrip()


def resealed(text: str, payload: bytes = b"") -> bytes:
    """A file with another header, of which the checksum is right."""
    start = text.index('"header":"') + len('"header":"')
    text = text[:start] + checksum((text[:start] + text[start + 32 :]).encode()) + text[start + 32 :]
    room = int.from_bytes(RAW[:8], "little")
    return struct.pack("<Q", room) + text.encode().ljust(room) + payload


def take(raw: bytes, key: str = KEY, layout: ChunkLayout = LAYOUT) -> list[bytes]:
    """As a reader does that gets a chunk whole: checks, and only then decodes."""
    metadata = check_encoded_header(raw, key, layout)
    payload, sizes = raw[encoded_header_size(layout) :], metadata.sizes
    bases, refinements = payload[: sizes.base_bytes], payload[sizes.base_bytes :]
    check_encoded(bases, refinements, metadata)
    parts = [memoryview(bytearray(size)) for size in layout.sizes]
    decode_into(bases, refinements, sizes, layout, parts)
    return list(map(bytes, parts))


# What is written can be read, by us and by the safetensors library.


@st.composite
def layouts(draw: st.DrawFn) -> ChunkLayout:
    dtypes = st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2])
    names = [f"layers.{n // 2}.{'values' if n % 2 else 'keys'}" for n in range(draw(st.integers(1, 24)))]
    pieces = [Piece(name, draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(dtypes)) for name in names]
    return ChunkLayout(draw(st.integers(1, 60)), tuple(pieces))


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), model=st.text(max_size=400))
def test_what_is_written_comes_back(layout: ChunkLayout, model: str) -> None:
    payload = kv(layout)
    metadata, encoded = described(layout, payload, model)
    header = encode_header(layout, metadata)
    assert len(header) == encoded_header_size(layout)
    assert len(header) % ALIGNMENT == 0
    assert len(header) + len(encoded) <= most_stored_bytes(layout)
    read, found = parse_encoded_header(header)
    assert check_encoded_header(header, KEY, layout) == read == replace(metadata, facts=read.facts)
    assert model.endswith(read.facts.model)
    assert read.facts == replace(metadata.facts, model=read.facts.model)
    assert found == ChunkLayout(layout.chunk_size, tuple(replace(piece, layer=0) for piece in layout.pieces))
    assert b"".join(take(header + encoded, layout=layout)) == payload
    assert check_encoded_file(header + encoded, KEY, deep=True) == read


def test_the_safetensors_library_reads_it() -> None:
    payload = kv(LAYOUT)
    tensors = load(RAW)
    metadata, _ = parse_encoded_header(RAW)
    assert set(tensors) == {
        "layers.0.keys.base", "layers.0.keys.refinement", "layers.0.values.base", "layers.0.values.refinement",
        "layers.1.keys", "layers.1.values.base", "layers.1.values.refinement",
    }  # fmt: skip
    assert bytes_of(tensors["layers.1.keys"]) == payload[sum(LAYOUT.sizes[:2]) : sum(LAYOUT.sizes[:3])]
    assert tensors["layers.0.keys.base"].dtype is torch.uint8
    assert tensors["layers.1.values.refinement"].nbytes == metadata.sizes.refinements[3]
    offsets = [entry["data_offsets"] for name, entry in json.loads(header_of(RAW)).items() if name != "__metadata__"]
    assert [start for start, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
    names = [name.rpartition(".")[2] for name in json.loads(header_of(RAW)) if name != "__metadata__"]
    assert names == ["base", "base", "keys", "base", "refinement", "refinement", "refinement"]


def test_the_bases_can_be_read_alone() -> None:
    metadata = check_encoded_header(RAW, KEY, LAYOUT)
    start = encoded_header_size(LAYOUT)
    bases = RAW[start : start + metadata.sizes.base_bytes]
    check_encoded(bases, b"", metadata)
    parts = [memoryview(bytearray(size)) for size in LAYOUT.sizes]
    decode_base_into(bases, metadata.sizes, LAYOUT, parts)
    keys = torch.frombuffer(bytearray(kv(LAYOUT)[: LAYOUT.sizes[0]]), dtype=torch.bfloat16)
    assert bytes(parts[0]) == bytes_of(rounded(keys))


def test_some_pieces_can_be_checked_alone() -> None:
    metadata, payload = described(LAYOUT, kv(LAYOUT))
    sizes, first = metadata.sizes, 2
    bases = payload[sum(sizes.bases[:first]) : sizes.base_bytes]
    refinements = payload[sizes.base_bytes + sum(sizes.refinements[:first]) :]
    check_encoded(bases, refinements, metadata, first)
    check_encoded(bases[: sizes.bases[2]], b"", metadata, first, 1)
    with pytest.raises(CorruptChunk):
        check_encoded(bases, refinements, metadata, 1)


@pytest.mark.parametrize("count", [1, 2, 30, 31, 59, 60, 61, 120, 400])
@pytest.mark.parametrize("model", ["", "x" * 10_000, "模型" * 200, "\U0001f370" * 200, '"\\\n\0' * 100, "\udcff" * 200])
def test_no_name_and_no_sizes_burst_the_header(count: int, model: str) -> None:
    pieces = tuple(Piece(f"layers.{n}.keys", 9, 111, torch.bfloat16 if n % 3 else torch.float16) for n in range(count))
    layout = ChunkLayout(99_999, pieces)
    sizes = EncodedSizes(
        tuple(size if not n % 3 else size - 999_999 for n, size in enumerate(layout.sizes)),
        tuple(0 if not n % 3 else 999_998 for n in range(count)),
    )
    facts = ChunkMetadata(KEY, PARENT, 10**18 - 1, SPACE, model, ("f" * 32,) * count)
    header = encode_header(layout, EncodedMetadata(facts, sizes, "f" * 16 * count, "f" * 16 * count))
    assert len(header) == encoded_header_size(layout)
    assert check_encoded_header(header, KEY, layout).sizes == sizes


def test_the_header_of_a_small_model_takes_little() -> None:
    """30 layers, 3 heads of 64: 16 KiB of the 3 MB of a chunk of 128 tokens."""
    pieces = tuple(Piece(f"layers.{n // 2}.{'keys' if n % 2 else 'values'}", 3, 64, torch.bfloat16) for n in range(60))
    layout = ChunkLayout(128, pieces)
    assert encoded_header_size(layout) <= 16384
    assert encoded_header_size(layout) - header_size(layout) <= 0.002 * layout.nbytes


# The versions.


def test_each_version_knows_its_own() -> None:
    payload = kv(LAYOUT)
    facts = ChunkMetadata(KEY, PARENT, 3, SPACE, "a model", checksums(payload, LAYOUT))
    plain = encode_header_of_version_2(LAYOUT, facts) + payload
    assert is_encoded(RAW)
    assert not is_encoded(plain)
    assert not is_encoded(b"")
    with pytest.raises(CorruptChunk, match="format version"):
        parse_header(RAW)
    with pytest.raises(CorruptChunk, match="format version"):
        parse_encoded_header(plain)


def test_files_of_all_versions_stay_readable() -> None:
    """Checked-in files, written when each version was new, of one and the same KV."""
    plain, encoded = ((DATA / f"version-{version}.safetensors").read_bytes() for version in (2, 3))
    facts = check_file(plain, KEY)
    metadata = check_encoded_file(encoded, KEY, deep=True)
    assert metadata.facts == facts
    assert b"".join(take(encoded)) == plain[header_size(LAYOUT) :]


def test_what_is_written_today_is_what_was_written_then() -> None:
    plain = (DATA / "version-2.safetensors").read_bytes()
    metadata, encoded = described(LAYOUT, plain[header_size(LAYOUT) :])
    assert encode_header(LAYOUT, metadata) + encoded == (DATA / "version-3.safetensors").read_bytes()


# What is not exactly the chunk that was asked for is refused.


@pytest.mark.fault("KV", "A byte of an encoded chunk has changed.", "Its checksum tells, before it is decoded.")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_wrong_bit_is_caught(data: st.DataObject) -> None:
    start = 8 * data.draw(st.sampled_from([0, encoded_header_size(LAYOUT)]))
    end = 8 * (len(header_of(RAW)) + 8 if start == 0 else len(RAW))
    bit = data.draw(st.integers(start, end - 1))
    raw = bytearray(RAW)
    raw[bit // 8] ^= 1 << bit % 8
    for look in (take, check_encoded_file_of):
        with pytest.raises(CorruptChunk):
            look(bytes(raw))


def check_encoded_file_of(raw: bytes) -> object:
    return check_encoded_file(raw, KEY)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(RAW) - 1))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CorruptChunk):
        check_encoded_file(RAW[:length], KEY)


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(CorruptChunk, match="payload bytes"):
        check_encoded_file(RAW + b"\0", KEY)


def test_another_key_is_refused() -> None:
    for look in (lambda: check_encoded_file(RAW, PARENT), lambda: take(RAW, PARENT)):
        with pytest.raises(CorruptChunk, match=PARENT):
            look()


@pytest.mark.parametrize(
    "other",
    [
        ChunkLayout(8, LAYOUT.pieces),
        ChunkLayout(16, LAYOUT.pieces[::-1]),
        ChunkLayout(24, LAYOUT.pieces[:-1]),
        ChunkLayout(24, (*LAYOUT.pieces, Piece("layers.2.keys", 1, 1, torch.float32))),
        ChunkLayout(24, (Piece("layers.0.keys", 4, 4, torch.bfloat16), *LAYOUT.pieces[1:])),
        ChunkLayout(24, (Piece("layers.0.keys", 2, 8, torch.float16), *LAYOUT.pieces[1:])),
        ChunkLayout(24, (Piece("layers.7.keys", 2, 8, torch.bfloat16), *LAYOUT.pieces[1:])),
        ChunkLayout(24, ()),
    ],
)
def test_another_layout_is_refused(other: ChunkLayout) -> None:
    with pytest.raises(CorruptChunk, match="other tensors"):
        check_encoded_header(RAW, KEY, other)


def replaced(name: str, value: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf'"{name}":"[^"]*"', f'"{name}":"{value}"', text, count=1)


SIZES = parse_encoded_header(RAW)[0].sizes


def spaced(*numbers: int) -> str:
    return " ".join(map(str, numbers))


@pytest.mark.parametrize(
    "change",
    [
        replaced("format", "other"),
        replaced("version", "2"),
        replaced("version", "4"),
        replaced("codec", "zip"),
        replaced("codec_version", "2"),
        replaced("index", "01"),
        replaced("index", "-1"),
        replaced("key", KEY[1:]),
        replaced("model", "m" * 257),
        replaced("model", "\\\\ud8"),
        replaced("checksums", "0" * 32),
        replaced("checksums", ""),
        replaced("base_checksums", "0" * 16),
        replaced("refinement_checksums", "0" * 80),
        replaced("tokens", "25"),
        replaced("layout", "0" * 32),
        replaced("tokens", "0"),
        replaced("tokens", "9" * 10),
        replaced("pieces", ""),
        replaced("pieces", "4:BF16:2:8"),
        replaced("pieces", "1:BF16:2:8,1:BF16:2:6,1:F32:2:8"),
        replaced("pieces", "1:BF16:2:8,1:BF16:2:6,1:F32:2:8,999999:BF16:1:20"),
        replaced("pieces", "1:BF16:2:8,1:BF16:2:6,1:F32:2:8,1:U8:1:20"),
        replaced("pieces", "1:BF16:9999999999:9999999999"),
        replaced("bases", ""),
        replaced("bases", spaced(*SIZES.bases[:-1])),
        replaced("bases", spaced(*SIZES.bases, 5)),
        replaced("bases", spaced(SIZES.bases[0] + 1, SIZES.bases[1] - 1, *SIZES.bases[2:])),
        replaced("bases", spaced(0, *SIZES.bases[1:])),
        replaced("bases", spaced(10**12, *SIZES.bases[1:])),
        replaced("bases", "-5 5 5 5"),
        replaced("refinements", spaced(0, *SIZES.refinements[1:])),
        replaced("refinements", spaced(*SIZES.refinements[:2], 96, SIZES.refinements[3])),
        lambda text: text.replace('"dtype":"U8"', '"dtype":"I8"', 1),
        lambda text: text.replace('layers.0.keys.base"', 'layers.0.keys.bases"', 1),
        lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[1,', 1),
        lambda text: text.replace("},", "}, ", 1),
        lambda text: text.replace("]},", "]}, ", 1),
        lambda text: text + "}",
        lambda text: text[:-1],
        lambda text: text.replace('"codec":', '"cod":'),
    ],
)
def test_a_header_must_make_sense(change: Callable[[str], str]) -> None:
    """With a checksum of its own that is right, so that it is not for that that it is refused.

    A reader that knows the layout does not look at what it does not need: the tensor table.
    """
    text = header_of(RAW)
    assert resealed(text, RAW[encoded_header_size(LAYOUT) :]) == RAW
    changed = change(text)
    assert changed != text
    raw = resealed(changed, RAW[encoded_header_size(LAYOUT) :])
    with pytest.raises(CorruptChunk):
        check_encoded_file(raw, KEY)
    needed = what_a_reader_needs(changed) != what_a_reader_needs(text)
    with pytest.raises(CorruptChunk) if needed else nullcontext():
        assert b"".join(take(raw)) == kv(LAYOUT)


def what_a_reader_needs(header: str) -> str:
    return replaced("pieces", "")(header).partition('"},')[0]


@pytest.mark.fault(
    "KV", "A chunk is encoded by a codec that is not known here.", "A miss, with the codec's name in the reason."
)
@pytest.mark.parametrize(("name", "value"), [("codec", "zip"), ("codec_version", "2")])
def test_an_unknown_codec_is_named(name: str, value: str) -> None:
    raw = resealed(replaced(name, value)(header_of(RAW)))
    with pytest.raises(CorruptChunk, match=f"version . of .*{value if name == 'codec' else 'lossless'}"):
        check_encoded_header(raw, KEY, LAYOUT)


@pytest.mark.parametrize("moved", [8, ALIGNMENT, -8])
def test_a_header_of_another_length_is_refused(moved: int) -> None:
    size = encoded_header_size(LAYOUT)
    raw = struct.pack("<Q", size - 8 + moved) + RAW[8:size].ljust(size + moved)[: size - 8 + moved] + RAW[size:]
    for look in (take, check_encoded_file_of):
        with pytest.raises(CorruptChunk):
            look(raw)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_anything_else_is_refused(start: bytes, with_length: bool) -> None:
    raw = struct.pack("<Q", len(start)) + start if with_length else start
    with pytest.raises(CorruptChunk):
        parse_encoded_header(raw)
    assert not is_encoded(raw)


@pytest.mark.fault("KV", "An encoded chunk decodes to other KV than was encoded.", "A deep verification finds it.")
def test_a_deep_look_decodes() -> None:
    metadata, payload = described(LAYOUT, kv(LAYOUT))
    wrong = replace(metadata, facts=replace(metadata.facts, checksums=checksums(kv(LAYOUT, seed=1), LAYOUT)))
    raw = encode_header(LAYOUT, wrong) + payload
    check_encoded_file(raw, KEY)
    with pytest.raises(CorruptChunk, match="decodes to other KV"):
        check_encoded_file(raw, KEY, deep=True)
