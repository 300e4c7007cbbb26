"""A chunk at rest: readable by everyone, of a size known beforehand, and refused when one bit of it is wrong."""

from __future__ import annotations

import json
import string
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file

from cake_hf import CorruptChunk
from cake_hf.chunks import codec
from cake_hf.chunks.codec import (
    ALIGNMENT,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    MAX_MODEL_NAME,
    ChunkMetadata,
    check_file,
    check_header,
    check_pieces,
    checksum,
    checksums,
    encode_header,
    header_size,
    parse_header,
)
from cake_hf.chunks.layout import ChunkLayout, Piece, dtype_name
from cake_hf.chunks.tensor_table import payload_size

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
KEY, PARENT, SPACE = "0a" * 20, "1b" * 20, "2c" * 20

hex_keys = st.text("0123456789abcdef", min_size=40, max_size=40)


@st.composite
def layouts(draw: st.DrawFn) -> ChunkLayout:
    pieces = []
    for layer in range(draw(st.integers(1, 5))):
        for kind in ("keys", "values"):
            heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 9))
            pieces.append(Piece(f"layers.{layer}.{kind}", heads, head_dim, draw(st.sampled_from(DTYPES))))
    return ChunkLayout(draw(st.integers(1, 20)), tuple(pieces))


@st.composite
def all_facts(draw: st.DrawFn) -> ChunkMetadata:
    return ChunkMetadata(
        key=draw(hex_keys),
        parent=draw(hex_keys),
        index=draw(st.integers(0, 2**40)),
        namespace=draw(hex_keys),
        model=draw(st.text(max_size=300)),
        checksums=tuple(draw(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), max_size=10))),
    )


LAYOUT = ChunkLayout(16, (Piece("layers.0.keys", 2, 4, torch.float32), Piece("layers.0.values", 2, 6, torch.bfloat16)))
VALUES = [torch.randn(16, 2, 4), torch.randn(16, 2, 6).to(torch.bfloat16)]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def metadata_of(payload: bytes, model: str = "a model", layout: ChunkLayout | None = None) -> ChunkMetadata:
    return ChunkMetadata(KEY, PARENT, 3, SPACE, model, checksums(payload, layout or LAYOUT))


def take(raw: bytes, pieces: list[bytes], key: str, layout: ChunkLayout) -> None:
    """As a loader does that reads a chunk whole."""
    check_pieces(pieces, check_header(raw, key, layout))


def parts_of(raw: bytes) -> tuple[bytes, list[bytes]]:
    """Header and pieces of a file of our layout."""
    size, keys_bytes = header_size(LAYOUT), LAYOUT.sizes[0]
    return raw[:size], [raw[size : size + keys_bytes], raw[size + keys_bytes :]]


def chunk_file(model: str = "a model") -> bytes:
    pieces = [bytes_of(value) for value in VALUES]
    return encode_header(LAYOUT, metadata_of(b"".join(pieces), model)) + b"".join(pieces)


def file_with_header(header: object, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


# What is written can be read, by us and by the safetensors library.


@given(layouts(), all_facts())
def test_a_header_comes_back_as_it_was(layout: ChunkLayout, facts: ChunkMetadata) -> None:
    read, table = parse_header(encode_header(layout, facts))
    assert table == layout.tensor_table
    assert read.model == facts.model[-MAX_MODEL_NAME:]
    assert read == ChunkMetadata(facts.key, facts.parent, facts.index, facts.namespace, read.model, facts.checksums)


@given(layouts(), all_facts())
def test_the_size_of_a_header_depends_on_the_layout_alone(layout: ChunkLayout, facts: ChunkMetadata) -> None:
    header = encode_header(layout, facts)
    assert len(header) == header_size(layout)
    assert len(header) % ALIGNMENT == 0


@pytest.mark.parametrize("name", ["", "x" * 10_000, "模型" * 200, "\U0001f370" * 200, '"\\\n\0' * 100, "\udcff" * 200])
def test_no_model_name_bursts_the_header(name: str) -> None:
    """Tables of all lengths, so that in some of them little room is left before the next page."""
    for layers in range(1, 200, 7):
        layout = ChunkLayout(16, tuple(Piece(f"layers.{n}.keys", 1, 1, torch.float32) for n in range(layers)))
        payload = bytes(layout.nbytes)
        header = encode_header(layout, ChunkMetadata(KEY, PARENT, 2**40, SPACE, name, checksums(payload, layout)))
        assert len(header) == header_size(layout)
        check_file(header + payload, KEY)
        assert len(load(header + payload)) == layers


@given(layouts(), st.data())
def test_the_safetensors_library_reads_what_we_write(layout: ChunkLayout, data: st.DataObject) -> None:
    payload = data.draw(st.binary(min_size=layout.nbytes, max_size=layout.nbytes))
    raw = encode_header(layout, metadata_of(payload, layout=layout)) + payload
    tensors = load(raw)
    assert set(tensors) == {piece.name for piece in layout.pieces}
    for piece in layout.pieces:
        tensor = tensors[piece.name]
        assert tuple(tensor.shape) == (layout.chunk_size, piece.heads, piece.head_dim)
        assert tensor.dtype == piece.dtype
    assert b"".join(bytes_of(tensors[piece.name]) for piece in layout.pieces) == payload


def test_the_safetensors_library_reads_our_files(tmp_path: Path) -> None:
    path = tmp_path / "chunk.safetensors"
    path.write_bytes(chunk_file("ein Modell, 模型"))
    loaded = load_file(path)
    assert list(loaded) == ["layers.0.keys", "layers.0.values"]
    assert all(torch.equal(loaded[piece.name], value) for piece, value in zip(LAYOUT.pieces, VALUES, strict=True))
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["key"] == KEY
        assert opened.metadata()["model"] == "ein Modell, 模型"


def test_the_payload_begins_on_a_page() -> None:
    (length,) = struct.unpack("<Q", chunk_file()[:8])
    assert (8 + length) % ALIGNMENT == 0


def test_each_piece_has_a_checksum_of_its_own() -> None:
    header, pieces = parts_of(chunk_file())
    facts = check_header(header, KEY, LAYOUT)
    assert facts.checksums == tuple(checksum(piece) for piece in pieces)
    assert checksum(b"abc") == checksum(memoryview(b"abc")) != checksum(b"abd")
    check_pieces(pieces[1:], facts, 1)
    with pytest.raises(CorruptChunk):
        check_pieces(pieces[1:], facts, 0)


@given(st.data())
def test_any_wrong_letter_of_the_header_is_caught(data: st.DataObject) -> None:
    """What it says beside its tensors (its place, its parent, the model's name) is as safe as these."""
    header, _ = parts_of(chunk_file())
    text = header.rstrip()
    place = data.draw(st.integers(8, len(text) - 1))
    letter = data.draw(st.integers(32, 126).filter(lambda letter: letter != text[place]))
    wrong = header[:place] + bytes([letter]) + header[place + 1 :]
    with pytest.raises(CorruptChunk):
        check_header(wrong, KEY, LAYOUT)


def test_a_file_that_is_right_is_taken() -> None:
    raw = chunk_file()
    size = header_size(LAYOUT)
    assert check_file(raw, KEY) == metadata_of(raw[size:])
    assert check_file(memoryview(raw), KEY) == check_file(bytearray(raw), KEY)
    take(*parts_of(raw), KEY, LAYOUT)


# What is not exactly the chunk that was asked for is refused.


@given(st.data())
def test_any_wrong_bit_of_the_payload_is_caught(data: st.DataObject) -> None:
    raw = bytearray(chunk_file())
    size = header_size(LAYOUT)
    bit = data.draw(st.integers(size * 8, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptChunk, match="checksum"):
        check_file(raw, KEY)
    with pytest.raises(CorruptChunk, match="checksum"):
        take(*parts_of(raw), KEY, LAYOUT)


@given(st.integers(0, len(chunk_file()) - 1))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CorruptChunk):
        check_file(chunk_file()[:length], KEY)


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(CorruptChunk, match="payload bytes"):
        check_file(chunk_file() + b"\0", KEY)


def test_another_key_is_refused() -> None:
    raw = chunk_file()
    with pytest.raises(CorruptChunk, match=PARENT):
        check_file(raw, PARENT)
    with pytest.raises(CorruptChunk, match=PARENT):
        take(*parts_of(raw), PARENT, LAYOUT)


@pytest.mark.parametrize(
    "other",
    [
        ChunkLayout(8, LAYOUT.pieces),
        ChunkLayout(16, LAYOUT.pieces[::-1]),
        ChunkLayout(16, LAYOUT.pieces[:1]),
        ChunkLayout(16, (*LAYOUT.pieces, Piece("layers.1.keys", 1, 1, torch.float32))),
        ChunkLayout(16, (Piece("layers.0.keys", 4, 2, torch.float32), LAYOUT.pieces[1])),
        ChunkLayout(16, (LAYOUT.pieces[0], Piece("layers.0.values", 2, 6, torch.float16))),
        ChunkLayout(16, (Piece("layers.1.keys", 2, 4, torch.float32), LAYOUT.pieces[1])),
    ],
)
def test_another_layout_is_refused(other: ChunkLayout) -> None:
    raw = chunk_file()
    with pytest.raises(CorruptChunk, match="other tensors"):
        take(*parts_of(raw), KEY, other)


METADATA = {
    "format": "cake_hf",
    "version": FORMAT_VERSION,
    "key": KEY,
    "parent": PARENT,
    "index": "0",
    "namespace": SPACE,
    "model": "m",
    "checksums": "",
}


def sealed(metadata: dict[str, object], table: object = None) -> dict[str, object]:
    """Metadata with a checksum that is right, so that it is not for that that it is refused."""
    text = json.dumps([metadata, table or {}], sort_keys=True, separators=(",", ":"))
    return {**metadata, "header": checksum(text.encode())}


def test_the_hand_made_header_is_a_good_one() -> None:
    """The cases below differ from it in one thing each, so it is that thing that they are refused for."""
    assert check_file(file_with_header({"__metadata__": sealed(METADATA)}), KEY).index == 0


@pytest.mark.parametrize("missing", METADATA)
def test_metadata_must_be_complete(missing: str) -> None:
    metadata = {name: value for name, value in METADATA.items() if name != missing}
    with pytest.raises(CorruptChunk):
        check_file(file_with_header({"__metadata__": sealed(metadata)}), KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": "999"},
        {"version": 1},
        {"index": "one"},
        {"index": None},
        {"index": []},
        {"index": float("inf")},
        {"index": float("nan")},
        {"index": "9" * 5000},
        {"checksums": "0" * 32},
        {"checksums": 0},
        {"index": "-1"},
        {"index": "01"},
        {"index": " 1"},
        {"index": "1_0"},
        {"index": "\u0661"},
        {"index": "1" + "0" * 18},
        {"index": 1},
        {"parent": ""},
        {"parent": PARENT[:-1]},
        {"parent": PARENT + "\n"},
        {"parent": "../" + PARENT[3:]},
        {"namespace": SPACE + "0"},
        {"namespace": ["0"] * 40},
        {"model": "m" * (MAX_MODEL_NAME + 1)},
        {"model": 7},
    ],
)
def test_metadata_must_make_sense(change: dict[str, object]) -> None:
    with pytest.raises(CorruptChunk):
        check_file(file_with_header({"__metadata__": sealed({**METADATA, **change})}), KEY)


@pytest.mark.parametrize(
    "header", [None, 1, "text", [], [METADATA], {"__metadata__": [METADATA]}, {"__metadata__": None}]
)
def test_a_header_must_be_a_table(header: object) -> None:
    with pytest.raises(CorruptChunk):
        check_file(file_with_header(header), KEY)


EMPTY: dict[str, object] = {"dtype": "F32", "shape": [0, 2, 4], "data_offsets": [0, 0]}


def file_with_a_tensor(entry: object, payload: bytes = b"") -> bytes:
    metadata = {**METADATA, "checksums": checksum(payload)}
    return file_with_header({"__metadata__": sealed(metadata, {"x": entry}), "x": entry}, payload)


def test_the_hand_made_tensors_are_good_ones() -> None:
    """As above: what is refused below is so for the one thing in which it differs."""
    check_file(file_with_a_tensor(EMPTY), KEY)
    check_file(file_with_a_tensor({"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, bytes(12)), KEY)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": [-2, -3], "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": [2.0, 3], "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": [True, 6], "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": ["2", 3], "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": {"2": 3}, "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": [1] * 7 + [2, 3], "data_offsets": [0, 12]},
        {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0.0, 12.0]},
        {"dtype": "BF16", "shape": [2, 3]},
        {"dtype": "BF16", "data_offsets": [0, 12]},
        {"dtype": "I64", "shape": [2, 3], "data_offsets": [0, 12]},
        {"dtype": None, "shape": [2, 3], "data_offsets": [0, 12]},
        {"dtype": ["BF16"], "shape": [2, 3], "data_offsets": [0, 12]},
        {"shape": [2, 3], "data_offsets": [0, 12]},
    ],
)
def test_a_tensor_is_as_large_as_its_dtype_and_shape(entry: dict[str, object]) -> None:
    with pytest.raises(CorruptChunk):
        parse_header(file_with_a_tensor(entry, bytes(12)))


def test_shapes_beyond_all_bounds_are_not_multiplied() -> None:
    huge = {"dtype": "F32", "shape": [10**4000] * 8, "data_offsets": [0, 10**4000]}
    with pytest.raises(CorruptChunk):
        parse_header(file_with_a_tensor(huge))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"data_offsets": None},
        {"data_offsets": {}},
        {"data_offsets": [0]},
        {"data_offsets": [0, 0, 0]},
        {"data_offsets": ["a", "b"]},
        {"data_offsets": [None, None]},
        {"data_offsets": [[], []]},
        {"data_offsets": [0, float("inf")]},
        {"data_offsets": [float("-inf"), 0]},
        {"data_offsets": [0, float("nan")]},
        {"data_offsets": [0, -1]},
        {"data_offsets": [-1, 0]},
        {"data_offsets": [1, 1]},
        {"data_offsets": [0, 2**62]},
    ],
)
def test_a_tensor_table_must_make_sense(entry: object) -> None:
    with pytest.raises(CorruptChunk):
        check_file(file_with_a_tensor({**EMPTY, **entry} if isinstance(entry, dict) else entry), KEY)


def test_tensors_lie_back_to_back() -> None:
    assert payload_size({"b": {"data_offsets": [4, 9]}, "a": {"data_offsets": [0, 4]}}) == 9
    for second in ([3, 9], [5, 9], [4, 3]):
        with pytest.raises(CorruptChunk, match="overlap or leave holes"):
            payload_size({"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": second}})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"\xff" * 40, b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000]
)
def test_a_header_that_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptChunk):
        parse_header(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, MAX_HEADER_BYTES + 1, len(chunk_file()) - 7])
def test_a_header_that_claims_to_be_huge_takes_no_memory(length: int) -> None:
    raw = struct.pack("<Q", length) + chunk_file()[8:]
    tracemalloc.start()
    try:
        with pytest.raises(CorruptChunk, match="claims"):
            parse_header(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**6


def test_a_header_that_is_huge_is_not_parsed() -> None:
    text = b" " * (MAX_HEADER_BYTES + 1)
    with pytest.raises(CorruptChunk, match="claims"):
        parse_header(struct.pack("<Q", len(text)) + text)


def refuse_or_take(raw: bytes) -> None:
    """Whatever the bytes are, the only way to say no is CorruptChunk, and it costs no memory to speak of."""
    tracemalloc.start()
    try:
        with suppress(CorruptChunk):
            parse_header(raw)
        with suppress(CorruptChunk):
            check_file(raw, KEY)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**6 + 20 * len(raw)


@given(st.binary(max_size=300))
def test_fuzz_bytes(raw: bytes) -> None:
    refuse_or_take(raw)


@given(st.data())
def test_fuzz_a_good_file_with_some_bytes_changed(data: st.DataObject) -> None:
    raw = bytearray(chunk_file())
    interesting = st.one_of(st.integers(0, 700), st.integers(0, len(raw) - 1))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(interesting)] = data.draw(st.integers(0, 255))
    refuse_or_take(bytes(raw))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*METADATA, "offsets", "entry", "table", "extra"]), json_values)
def test_fuzz_a_header_of_the_right_shape(place: str, value: object) -> None:
    """JSON that is nearly ours reaches further into the parser than any random bytes do."""
    entry: object = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    metadata: dict[str, object] = {**METADATA, "checksums": checksum(b"1234")}
    if place in METADATA:
        metadata[place] = value
    elif place == "offsets":
        entry = {"dtype": "F32", "shape": [1], "data_offsets": value}
    elif place == "entry":
        entry = value
    table = {"x": entry, **({"y": value} if place == "extra" else {})}
    header: object = {"__metadata__": sealed(metadata, table), **table}
    refuse_or_take(file_with_header(value if place == "table" else header, b"1234"))


@given(layouts(), layouts())
def test_check_header_takes_its_own_layout_only(layout: ChunkLayout, other: ChunkLayout) -> None:
    payload = bytes(layout.nbytes)
    header = encode_header(layout, metadata_of(payload, layout=layout))
    check_header(header, KEY, layout)
    assume(layout != other)
    with pytest.raises(CorruptChunk):
        check_header(header, KEY, other)


def test_a_header_that_somebody_wrote_anew_is_taken() -> None:
    """In another order and with blanks it says the same; only it is not recognised at sight."""
    header, _ = parts_of(chunk_file())
    table = json.loads(header[8:])
    anew = json.dumps(dict(reversed(table.items()))).encode().ljust(len(header) - 8)
    assert check_header(header[:8] + anew, KEY, LAYOUT) == check_header(header, KEY, LAYOUT)


NAMES = st.text(string.printable, max_size=MAX_MODEL_NAME) | st.text(max_size=MAX_MODEL_NAME)


@given(layouts(), all_facts(), NAMES)
def test_what_is_recognised_at_sight_is_what_would_be_parsed(
    layout: ChunkLayout, facts: ChunkMetadata, model: str
) -> None:
    header = encode_header(layout, replace(facts, model=model))
    parsed, usual = parse_header(header), codec._usual_header(header, layout)
    name = parsed[0].model
    assert usual == (parsed if json.dumps(name) == f'"{name}"' else None)


@given(st.data())
def test_a_header_with_a_wrong_letter_is_not_recognised(data: st.DataObject) -> None:
    header = bytearray(parts_of(chunk_file())[0])
    header[data.draw(st.integers(0, len(header) - 1))] ^= data.draw(st.integers(1, 255))
    assert codec._usual_header(header, LAYOUT) is None


# The layout itself.


@given(layouts())
def test_a_layout_says_how_large_a_chunk_is(layout: ChunkLayout) -> None:
    tensors = [torch.empty(layout.chunk_size, p.heads, p.head_dim).to(p.dtype) for p in layout.pieces]
    assert layout.sizes == tuple(tensor.nbytes for tensor in tensors)
    assert layout.nbytes == sum(layout.sizes) == payload_size(layout.tensor_table)
    assert list(layout.tensor_table) == [piece.name for piece in layout.pieces]


def test_a_dtype_that_kv_is_never_kept_in_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.int8 cannot be stored"):
        dtype_name(torch.int8)
