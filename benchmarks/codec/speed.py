"""Size and speed of the codec, in GB of raw KV per second of the thread's own CPU time, as others may use the machine, too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks.codec.real_kv import RealKv
from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample, interleave
from cake_hf.chunks.codec import ChunkMetadata, checksum, checksums
from cake_hf.chunks.encoded_checks import describe
from cake_hf.chunks.encoded_header import check_encoded_header, encode_header, encoded_header_size
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import Codec, Encoded, decode_base_into, decode_into, encode
from cake_hf.chunks.lossless_numpy import NumpyCodec
from cake_hf.chunks.native import PORTABLE, NativeCodec, library
from cake_hf.errors import CakeError

SMALL, QUICK_TO_DECODE, QUICK_TO_ENCODE = Goal(0.71), Goal(4.5, at_most=False), Goal(2.0, at_most=False)
KEY = "0" * 40

Work = Callable[[], object]


def codecs() -> dict[str, Codec]:
    """All that there are here, by name; the first one is what a cache uses."""
    found = library()
    native: dict[str, Codec] = (
        {} if found is None else {"native": NativeCodec(found), "portable": NativeCodec(found, PORTABLE)}
    )
    return {**native, "numpy": NumpyCodec()}


def places(layout: ChunkLayout) -> list[memoryview]:
    """Memory for a chunk's pieces, touched."""
    return [memoryview(bytearray(size)) for size in layout.sizes]


def measure(kv: RealKv, chunk_size: int, rounds: int) -> Result:
    """Encode and decode all chunks of a text with each codec, in turns."""
    layout, payloads = kv.layout(chunk_size), kv.payloads(chunk_size)
    found, nbytes = codecs(), sum(map(len, payloads))
    encoded = [encode(payload, layout, next(iter(found.values()))) for payload in payloads]
    arms: dict[str, Work] = {"copy": partial(_copy, payloads, layout), "checksum": partial(_hash, payloads, layout)}
    for name, codec in found.items():
        _check(payloads, encoded, layout, codec)
        arms[f"{name} decode"] = partial(_decode, encoded, layout, codec)
        arms[f"{name} decode base"] = partial(_decode_base, encoded, layout, codec)
        arms[f"{name} encode"] = partial(_encode, payloads, layout, codec)
    seconds = interleave({name: partial(_cpu_seconds, work) for name, work in arms.items()}, rounds)
    speeds = {name: Sample(tuple(nbytes / each / 1e9 for each in times)) for name, times in seconds.items()}
    goals = {
        f"{next(iter(found))} {what}": goal for what, goal in (("decode", QUICK_TO_DECODE), ("encode", QUICK_TO_ENCODE))
    }
    figures = {
        "size": _share("size over raw", sum(each.sizes.nbytes for each in encoded), nbytes, SMALL),
        "base_size": _share("size of the bases alone", sum(each.sizes.base_bytes for each in encoded), nbytes),
        "file_size": _share("file over raw KV", _file_bytes(encoded, payloads, layout), nbytes),
        **{name.replace(" ", "_"): Figure.of(name, sample, "GB/s", goals.get(name)) for name, sample in speeds.items()},
    }
    details = {"chunks": len(payloads), "chunk_size": chunk_size, "raw_bytes": nbytes}
    return Result(f"{kv.name}: {len(payloads)} chunks of {chunk_size} tokens, per thread", figures, dict(details))


def measure_header(kv: RealKv, chunk_size: int, rounds: int) -> Result:
    """How long the header of an encoded chunk takes, which is Python: other threads wait for the interpreter meanwhile."""
    layout, payload = kv.layout(chunk_size), kv.payloads(chunk_size)[0]
    facts = ChunkMetadata(KEY, KEY, 0, KEY, "", checksums(payload, layout))
    metadata = describe(facts, encode(payload, layout))
    raw = encode_header(layout, metadata)
    times = interleave(
        {
            "write": partial(_cpu_seconds, lambda: encode_header(layout, metadata)),
            "check": partial(_cpu_seconds, lambda: check_encoded_header(raw, KEY, layout)),
        },
        max(rounds, 20),
    )
    figures = {
        name: Figure.of(f"{name} a header", Sample(tuple(1e3 * each for each in found)), "ms")
        for name, found in times.items()
    }
    return Result(f"Header of an encoded chunk of {chunk_size} tokens, {len(layout.pieces)} pieces", figures)


def measure_together(kv: RealKv, chunk_size: int, rounds: int, threads: Sequence[int]) -> Result:
    """The speed of k threads that decode at once (k * D of the planner), in GB/s by the clock, and of each by its CPU time."""
    layout, payloads = kv.layout(chunk_size), kv.payloads(chunk_size)
    encoded, nbytes = [encode(payload, layout) for payload in payloads], sum(map(len, payloads))
    arms = {f"{count} threads": partial(_together, encoded, layout, count) for count in threads}
    found = interleave(arms, rounds)
    figures: dict[str, Figure] = {}
    for count, (name, runs) in zip(threads, found.items(), strict=True):
        by_clock = Sample(tuple(count * nbytes / wall / 1e9 for wall, _ in runs))
        by_cpu = Sample(tuple(count * nbytes / cpu / 1e9 for _, cpu in runs))
        figures[f"wall_{count}"] = Figure.of(f"{name}, all, by the clock", by_clock, "GB/s")
        figures[f"cpu_{count}"] = Figure.of(f"{name}, each, CPU time", by_cpu, "GB/s")
    return Result(f"{kv.name}: threads that decode chunks of {chunk_size} tokens at once", figures)


def _together(encoded: Sequence[Encoded], layout: ChunkLayout, count: int) -> tuple[float, float]:
    """Seconds by the clock, and seconds of CPU time of all threads, until each has decoded everything."""
    start, used = threading.Barrier(count), []

    def decode() -> None:
        parts = places(layout)
        start.wait()
        begin, cpu = time.perf_counter(), time.thread_time()
        for each in encoded:
            decode_into(each.bases, each.refinements, each.sizes, layout, parts)
        used.append((begin, time.perf_counter(), time.thread_time() - cpu))

    running = [threading.Thread(target=decode) for _ in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    begins, ends, seconds = zip(*used, strict=True)
    return max(ends) - min(begins), sum(seconds)


def _cpu_seconds(work: Work) -> float:
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def _copy(payloads: Sequence[bytes], layout: ChunkLayout) -> None:
    parts = [np.frombuffer(part, np.uint8) for part in places(layout)]
    for payload in payloads:
        start, source = 0, np.frombuffer(payload, np.uint8)
        for part in parts:
            np.copyto(part, source[start : start + part.nbytes])
            start += part.nbytes


def _hash(payloads: Sequence[bytes], layout: ChunkLayout) -> None:
    for payload in payloads:
        checksums(payload, layout)


def _encode(payloads: Sequence[bytes], layout: ChunkLayout, codec: Codec) -> None:
    for payload in payloads:
        encode(payload, layout, codec)


def _decode(encoded: Sequence[Encoded], layout: ChunkLayout, codec: Codec) -> list[memoryview]:
    parts = places(layout)
    for each in encoded:
        decode_into(each.bases, each.refinements, each.sizes, layout, parts, codec=codec)
    return parts


def _decode_base(encoded: Sequence[Encoded], layout: ChunkLayout, codec: Codec) -> None:
    parts = places(layout)
    for each in encoded:
        decode_base_into(each.bases, each.sizes, layout, parts, codec=codec)


def _check(payloads: Sequence[bytes], encoded: Sequence[Encoded], layout: ChunkLayout, codec: Codec) -> None:
    """Raises a CakeError if a codec gives back other bits than it was given."""
    for payload, each in zip(payloads, encoded, strict=True):
        if checksum(b"".join(_decode([each], layout, codec))) != checksum(payload):
            raise CakeError("A chunk was decoded to other bits than were encoded.")


def _file_bytes(encoded: Sequence[Encoded], payloads: Sequence[bytes], layout: ChunkLayout) -> int:
    return len(payloads) * encoded_header_size(layout) + sum(each.sizes.nbytes for each in encoded)


def _share(label: str, part: float, whole: float, goal: Goal | None = None) -> Figure:
    return Figure(label, part / whole, part / whole, part / whole, "x", goal)
