"""Whatever bytes a store holds: the readers take them or refuse them with a `CorruptChunk`, and take no memory to speak of.

CAKE_FUZZ=100000 pytest tests/test_fuzz.py                          # a long run; 1,000 cases by default
CAKE_FUZZ=5000 CAKE_FUZZ_FROM=20000 pytest tests/test_fuzz.py       # a piece of it
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from rich.console import Console

from cake_hf import CorruptChunk
from cake_hf.chunks.codec import (
    MAX_HEADER_BYTES,
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
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.cli.inspect_store import Inventory, StoredChunk, read_chunk
from cake_hf.cli.look_commands import chunk_table, listing, totals
from cake_hf.stores import MemoryStore
from cake_hf.stores.eviction import START_BYTES, place_in
from cake_hf.testing.contract import key_of, value_of

CASES = int(os.environ.get("CAKE_FUZZ", "1000"))
START = int(os.environ.get("CAKE_FUZZ_FROM", "0"))

EXPANSION = 26
"""Bytes of Python objects that a byte of JSON can become at worst ("[{},{},...]"); see the test at the end."""
SLACK = 2**14
"""Bytes of messages and bookkeeping."""

EXTREMES = [0, 1, 7, 8, 9, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
ODD_JSON: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        0.5,
        -0.0,
        1e308,
        10**30,
        10**4000,
        int("9" * 4300),
        float("nan"),
        float("inf"),
        float("-inf"),
    ),
    *("", "0", "-1", "9" * 5000, "\0", "\x1b[2J", "[/bold]", "\ud800", "x" * 3000, key_of(9)),
    *([], [0], [0, 0], [[0, 0]], [0, 2**62], ["0", "1"], {}, {"": {}}, {"data_offsets": [0, 0]}),
]


@dataclass(frozen=True)
class Sample:
    """A good chunk file."""

    key: str
    layout: ChunkLayout
    raw: bytes

    @property
    def split(self) -> int:
        """Where its payload begins."""
        return header_size(self.layout)


def sample(number: int, layers: int, dtype: torch.dtype, model: str) -> Sample:
    pieces = [Piece(f"layers.{n}.{kind}", 2, 4, dtype) for n in range(layers) for kind in ("keys", "values")]
    layout = ChunkLayout(16, tuple(pieces))
    payload = value_of(number, layout.nbytes)
    facts = ChunkMetadata(key_of(number), key_of(number + 1), number, key_of(99), model, checksums(payload, layout))
    return Sample(facts.key, layout, encode_header(layout, facts) + payload)


SAMPLES = [
    sample(0, 1, torch.float32, "a model"),
    sample(3, 3, torch.bfloat16, "模型 \U0001f370"),
    sample(8, 30, torch.float16, '"\\ [bold] \x1b[31m'),
]


# Ways to spoil a file. Each takes the file and a source of chance.


def flip_bits(raw: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 8)):
        if raw:
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)


def flip_bits_of_the_header(raw: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 4)):
        if raw:
            raw[draw.randrange(min(len(raw), 900))] ^= 1 << draw.randrange(8)


def cut(raw: bytearray, draw: random.Random) -> None:
    del raw[draw.choice([0, 1, 7, 8, 9, draw.randrange(len(raw) + 1), max(0, len(raw) - 1)]) :]


def grow(raw: bytearray, draw: random.Random) -> None:
    raw += draw.randbytes(draw.choice([1, 8, 100, 5000]))


def move(raw: bytearray, draw: random.Random) -> None:
    start, stop = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    piece = raw[start:stop]
    if draw.random() < 0.5:
        del raw[start:stop]
    at = draw.randrange(len(raw) + 1)
    raw[at:at] = piece


def claim(raw: bytearray, draw: random.Random) -> None:
    lengths = [*EXTREMES, len(raw) - 8, len(raw) - 7, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, draw.randrange(5000)]
    raw[:8] = struct.pack("<Q", max(0, draw.choice(lengths)))


def overwrite(raw: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(raw) + 1)
    noise = draw.choice([b"\0", b"\xff", b"[", b"{", b'"', b"9", b'"":{},', draw.randbytes(1)]) * draw.choice(
        [1, 8, 999]
    )
    raw[at : at + len(noise)] = noise


def edit_json(raw: bytearray, draw: random.Random) -> None:
    """Still JSON, but with something else in one or two places: this gets further than any noise."""
    header, payload = parts_of(raw)
    if header is None:
        return
    for _ in range(draw.randint(1, 2)):
        header = edited(header, draw)
    if draw.random() < 0.8:
        header = resealed(header)
    text = json.dumps(header, ensure_ascii=draw.random() < 0.9).encode(errors="replace")
    if draw.random() < 0.5:
        text = text.ljust(header_room(raw))
    raw[:] = struct.pack("<Q", len(text)) + text + payload


def resealed(header: Any) -> Any:
    """With a checksum of the header that is right, as a liar would make it: then it is not for that that it is refused."""
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        return header
    table = {name: entry for name, entry in header.items() if name != "__metadata__"}
    metadata = {name: value for name, value in header["__metadata__"].items() if name != "header"}
    try:
        said = json.dumps([metadata, table], sort_keys=True, separators=(",", ":")).encode()
    except ValueError:
        return header
    return {"__metadata__": {**metadata, "header": checksum(said)}, **table}


def edited(value: Any, draw: random.Random) -> Any:
    """The value with one place in it replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        if draw.random() < 0.15:
            return {other: kept for other, kept in value.items() if other != name}
        if draw.random() < 0.15:
            return {**value, draw.choice(["", "__metadata__", "x", name + "x"]): draw.choice([value[name], *ODD_JSON])}
        return {**value, name: edited(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        index = draw.randrange(len(value))
        return [*value[:index], edited(value[index], draw), *value[index + 1 :]]
    if isinstance(value, int) and abs(value) < 2**100 and draw.random() < 0.5:
        return draw.choice([value + 1, value - 1, -value, value * 2, *EXTREMES])
    return draw.choice(ODD_JSON)


def bomb(raw: bytearray, draw: random.Random) -> None:
    """JSON that takes far more memory or depth than bytes."""
    kind = draw.choice([b"[", b'{"a":', b"[{},", b"[0,", b'["",'])
    text = kind * draw.choice([10, 1000, 20_000])
    raw[:] = struct.pack("<Q", len(text)) + text + parts_of(raw)[1]


def swap_payload(raw: bytearray, draw: random.Random) -> None:
    other = draw.choice(SAMPLES)
    raw[header_room(raw) + 8 :] = other.raw[other.split :]


def parts_of(raw: bytearray) -> tuple[Any, bytes]:
    end = 8 + header_room(raw)
    try:
        return json.loads(bytes(raw[8:end])), bytes(raw[end:])
    except (ValueError, RecursionError):
        return None, bytes(raw[end:])


def header_room(raw: bytearray) -> int:
    (length,) = struct.unpack("<Q", bytes(raw[:8])) if len(raw) >= 8 else (0,)
    return int(min(length, max(0, len(raw) - 8)))


WAYS: list[Callable[[bytearray, random.Random], None]] = [
    *(flip_bits, flip_bits_of_the_header, cut, grow, move, claim, overwrite, bomb, swap_payload),
    *([edit_json] * 6),
]


def mutated(good: Sample, draw: random.Random) -> bytes:
    raw = bytearray(good.raw)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        draw.choice(WAYS)(raw, draw)
    return bytes(raw)


# The readers.


def pieces_of(good: Sample, raw: bytes) -> list[memoryview]:
    ends = list(accumulate(good.layout.sizes, initial=good.split))
    return [memoryview(raw)[begin:end] for begin, end in pairwise(ends)]


def read_as_a_restore_does(good: Sample, raw: bytes) -> None:
    """Header and pieces come in buffers of the sizes that the model needs; another size is refused before."""
    if len(raw) != len(good.raw):
        raise CorruptChunk("another size")
    facts = check_header(raw[: good.split], good.key, good.layout)
    check_pieces(pieces_of(good, raw), facts)
    assert raw[good.split :] == good.raw[good.split :], "a payload was taken that was never written"


def inspect(good: Sample, raw: bytes) -> StoredChunk:
    """As `cake-hf ls` reads a header."""
    store = MemoryStore(len(raw) + 1)
    store.write(good.key, [raw])
    chunk = read_chunk(store, good.key)
    assert chunk is not None
    return chunk


def show(chunk: StoredChunk) -> str:
    """As `cake-hf ls` and `info` print it."""
    shown, inventory = io.StringIO(), Inventory({chunk.metadata.key: chunk})
    console = Console(file=shown, width=100)
    for table in (chunk_table(chunk), listing(inventory, 5, {}), totals("a store", inventory)):
        console.print(table)
    return shown.getvalue()


def stated_bound(raw: bytes) -> int:
    """What reading these bytes may take: a copy of the file, and its header as Python objects."""
    header = header_room(bytearray(raw[:8])) or struct.unpack("<Q", raw[:8].ljust(8, b"\0"))[0]
    return len(raw) + EXPANSION * min(header, len(raw), MAX_HEADER_BYTES) + SLACK


def peak_of(call: Callable[[], object]) -> tuple[int, bool]:
    """Bytes that a call takes at most beyond what is there, and whether it refuses; any other error is raised."""
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    try:
        call()
        refused = False
    except CorruptChunk:
        refused = True
    return tracemalloc.get_traced_memory()[1] - before, refused


@pytest.mark.timeout(3600)
def test_mutated_chunk_files_through_all_readers() -> None:
    verdicts: Counter[tuple[str, bool]] = Counter()
    tracemalloc.start()
    try:
        for seed in range(START, START + CASES):
            draw = random.Random(seed)
            good = draw.choice(SAMPLES)
            raw = mutated(good, draw)
            readers: dict[str, Callable[[], object]] = {
                "header": partial(parse_header, raw),
                "file": partial(check_file, raw, good.key),
                "restore": partial(read_as_a_restore_does, good, raw),
                "inspection": partial(inspect, good, raw),
                "place": partial(place_in, raw[:START_BYTES]),
            }
            for name, reader in readers.items():
                peak, refused = peak_of(reader)
                verdicts[name, refused] += 1
                if peak > 2 * stated_bound(raw):
                    # Once in tens of thousands of cases the interpreter rebuilds its table of interned strings (4 MB) just
                    # then. What the reader itself takes, it takes again.
                    peak, _ = peak_of(reader)
                assert peak <= 2 * stated_bound(raw), f"case {seed}: {name} took {peak:,} bytes for {len(raw):,}"
    finally:
        tracemalloc.stop()
    print(
        f"\n{CASES:,} mutated files:", {f"{name} {'refused' if r else 'taken'}": n for (name, r), n in verdicts.items()}
    )
    for name in ("header", "file", "restore", "inspection"):
        assert min(verdicts[name, True], verdicts[name, False]) > CASES / 1000, f"{name} always says the same"


@pytest.mark.timeout(3600)
def test_headers_that_say_odd_things_can_be_shown() -> None:
    shown = 0
    for seed in range(START, START + CASES // 4):
        draw = random.Random(seed)
        good = SAMPLES[seed % 2]
        raw = bytearray(good.raw)
        edit_json(raw, draw)
        try:
            said = show(inspect(good, bytes(raw)))
            shown += 1
        except CorruptChunk as error:
            said = str(error)
        assert "\x1b" not in said, "a header gave the terminal a command"
    assert shown > CASES / 1000, "nearly all are refused, since each field has its form; but not all"


def test_the_good_files_are_taken() -> None:
    for good in SAMPLES:
        parse_header(good.raw)
        check_file(good.raw, good.key)
        read_as_a_restore_does(good, good.raw)
        assert good.key in show(inspect(good, good.raw))
        assert place_in(good.raw[:START_BYTES]) is not None


def test_no_header_takes_more_than_the_stated_bound() -> None:
    """The worst there is in JSON, as large as a header may be."""
    tracemalloc.start()
    try:
        for kind in (b"{},", b"[],", b"0,", b"1e1,", b'"\xc3\xa9",', b'{"a":0},'):
            text = b"[" + kind * ((MAX_HEADER_BYTES - 10) // len(kind) // 64) + b"0]"
            raw = struct.pack("<Q", len(text)) + text
            peak, refused = peak_of(partial(parse_header, raw))
            assert refused
            if peak > stated_bound(raw):  # see above: what the parser itself takes, it takes again
                peak, _ = peak_of(partial(parse_header, raw))
            assert len(text) < peak <= stated_bound(raw), kind
    finally:
        tracemalloc.stop()
