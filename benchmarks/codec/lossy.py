"""Speed of the lossy codecs, in GB of raw KV per second of the thread's own CPU time, in C and in numpy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from benchmarks.codec.real_kv import RealKv
from benchmarks.codec.speed import places
from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample, interleave
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import Encoded
from cake_hf.chunks.lossy import LOSSY, Method, code_chunk, decode_chunk, lossy_method

QUICK_TO_DECODE = Goal(5.0, at_most=False)
WITH_GOALS = ("int8", "int4")
MOST_BYTES = 2**24
"""Of KV that each round goes over: numpy and cachegen are slow."""


def measure(kv: RealKv, chunk_size: int, rounds: int) -> Result:
    """Code chunks of a text (encode them and replace them by what they decode to) and decode them, with each codec in turns."""
    layout, payloads = kv.layout(chunk_size), kv.payloads(chunk_size)
    payloads = payloads[: max(1, MOST_BYTES // layout.nbytes)]
    nbytes, methods = sum(map(len, payloads)), _methods()
    encoded = {
        name: [code_chunk(memoryview(bytearray(one)), layout, method) for one in payloads]
        for name, method in methods.items()
    }
    arms = {f"{name} code": partial(_code, payloads, layout, method) for name, method in methods.items()}
    arms |= {f"{name} decode": partial(_decode, encoded[name], layout, method) for name, method in methods.items()}
    speeds = {
        name: Sample(tuple(nbytes / seconds / 1e9 for seconds in found))
        for name, found in interleave(arms, rounds).items()
    }
    goals = {f"{name} decode": QUICK_TO_DECODE for name in WITH_GOALS}
    figures = {
        name.replace(",", "").replace(" ", "_"): Figure.of(name, sample, "GB/s", goals.get(name))
        for name, sample in speeds.items()
    }
    for name, chunks in encoded.items():
        size = sum(each.sizes.nbytes for each in chunks) / nbytes
        if not name.endswith("by pieces"):
            figures[f"{name}_size"] = Figure(f"{name}, size over raw", size, size, size, "x")
    title = f"{kv.name}: lossy codecs, {len(payloads)} chunks of {chunk_size} tokens, per thread"
    return Result(title, figures, {"chunks": len(payloads), "chunk_size": chunk_size, "raw_bytes": nbytes})


def _methods() -> dict[str, Method]:
    """All that can be used here; where a whole chunk is encoded at once, also piece by piece, in numpy."""
    found = {name: lossy_method(name) for name in LOSSY if name != "cachegen" or find_spec("constriction")}
    return found | {f"{name}, by pieces": replace(method, whole=None) for name, method in found.items() if method.whole}


def _code(payloads: Sequence[bytes], layout: ChunkLayout, method: Method) -> float:
    rooms = [memoryview(bytearray(payload)) for payload in payloads]
    begin = time.thread_time()
    for room in rooms:
        code_chunk(room, layout, method)
    return time.thread_time() - begin


def _decode(encoded: Sequence[Encoded], layout: ChunkLayout, method: Method) -> float:
    parts = places(layout)
    begin = time.thread_time()
    for each in encoded:
        decode_chunk(each.bases, each.refinements, each.sizes, layout, parts, method)
    return time.thread_time() - begin
