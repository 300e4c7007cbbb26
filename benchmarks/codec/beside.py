"""The main thread's forward beside a thread that loads: who takes the interpreter often slows it down.

The arms are alike but for what the second thread does: nothing that needs the interpreter (hashing), loading chunks as they
are (read, check), loading encoded ones (read, check, decode), decoding alone, and decoding in numpy. The speeds are by the
clock, as waiting for the interpreter takes no CPU time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from benchmarks.codec.real_kv import RealKv
from benchmarks.codec.speed import KEY, places
from benchmarks.figures import Figure, Goal, Result
from benchmarks.models import prefilled, run_on
from benchmarks.timing import Sample, interleave
from cake_hf.chunks.codec import ChunkMetadata, check_header, check_pieces, checksums, header_size
from cake_hf.chunks.codec import encode_header as plain_header
from cake_hf.chunks.encoded_checks import check_encoded, describe
from cake_hf.chunks.encoded_header import check_encoded_header, encode_header, encoded_header_size
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import decode_into, encode
from cake_hf.chunks.lossless_numpy import NumpyCodec

UNDISTURBED = Goal(0.95, at_most=False)
BEFORE, AT_ONCE = 256, 16
"""Tokens in the cache, and tokens of a forward."""

Load = Callable[[], object]


def measure(model: Any, kv: RealKv, chunk_size: int, rounds: int, folder: Path) -> Result:
    """Run forwards beside each kind of load, in turns."""
    layout = kv.layout(chunk_size)
    loads: dict[str, Load] = {"busy": _busy, **_loads(kv, layout, folder)}
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, BEFORE + AT_ONCE))
    cache = prefilled(model, ids[:, :BEFORE], BEFORE)
    run = partial(_forward_seconds, model, cache, ids[:, BEFORE:])
    run(None)
    arms = {"alone": partial(run, None), **{name: partial(run, load) for name, load in loads.items()}}
    seconds = {name: Sample(tuple(found)) for name, found in interleave(arms, rounds).items()}
    figures = {"seconds": Figure.of(f"a forward of {AT_ONCE} tokens, alone", seconds["alone"])}
    for name in loads:
        figures[name.replace(" ", "_")] = Figure.of(f"beside {name}", seconds[name])
    for name in ("encoded loads", "decoding", "decoding in numpy"):
        label = f"speed beside {name}, over raw loads"
        figures[f"{name.replace(' ', '_')}_over_raw"] = Figure.ratio(
            label, seconds["raw loads"], seconds[name], UNDISTURBED if name == "encoded loads" else None
        )
    return Result(f"{kv.name}: the main thread beside one thread that loads chunks of {chunk_size} tokens", figures)


def _forward_seconds(model: Any, cache: Any, ids: torch.Tensor, load: Load | None) -> float:
    """Seconds that a forward takes while a thread repeats the load."""
    stop, started = threading.Event(), threading.Event()

    def repeat() -> None:
        while load is not None and not stop.is_set():
            load()
            started.set()

    thread = threading.Thread(target=repeat)
    thread.start()
    if load is not None:
        started.wait()
    begin = time.perf_counter()
    with torch.inference_mode():
        run_on(model, cache, ids)
        seconds = time.perf_counter() - begin
        cache.crop(-ids.shape[1])
    stop.set()
    thread.join()
    return seconds


def _busy() -> None:
    xxhash.xxh3_128().update(bytes(2**24))  # lets other threads run


def _loads(kv: RealKv, layout: ChunkLayout, folder: Path) -> dict[str, Load]:
    """What a loader does with one chunk, from a file in the page cache."""
    payload = kv.payloads(layout.chunk_size)[0]
    facts = ChunkMetadata(KEY, KEY, 0, KEY, "", checksums(payload, layout))
    encoded = encode(payload, layout)
    raw_file, encoded_file = folder / "raw", folder / "encoded"
    raw_file.write_bytes(plain_header(layout, facts) + payload)
    header = encode_header(layout, describe(facts, encoded))
    encoded_file.write_bytes(b"".join((header, encoded.bases, encoded.refinements)))
    parts, plain_start = places(layout), memoryview(bytearray(header_size(layout)))
    slot, start = memoryview(bytearray(encoded_file.stat().st_size)), encoded_header_size(layout)

    def load_raw() -> None:
        _read(raw_file, [plain_start, *parts])
        check_pieces(parts, check_header(plain_start, KEY, layout))

    def load_encoded() -> None:
        _read(encoded_file, [slot])
        metadata = check_encoded_header(slot[:start], KEY, layout)
        end = start + metadata.sizes.base_bytes
        check_encoded(slot[start:end], slot[end:], metadata)
        decode_into(slot[start:end], slot[end:], metadata.sizes, layout, parts)

    def decode(codec: NumpyCodec | None) -> None:
        decode_into(encoded.bases, encoded.refinements, encoded.sizes, layout, parts, codec=codec)

    return {
        "raw loads": load_raw,
        "encoded loads": load_encoded,
        "decoding": partial(decode, None),
        "decoding in numpy": partial(decode, NumpyCodec()),
    }


def _read(path: Path, parts: list[memoryview]) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.preadv(file, parts, 0)
    finally:
        os.close(file)
