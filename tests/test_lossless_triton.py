"""The Triton kernel of the lossless codec, by Triton's interpreter on the CPU: the same bits as the other decoders.

Needs Triton, which the environment of the tests lacks where torch is its CPU build: `make test-triton`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import CorruptChunk
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import Encoded, EncodedSizes, decode_base_into, decode_into, encode
from cake_hf.chunks.stored_forms import split

if os.environ.get("CAKE_HF_REQUIRE_TRITON"):
    import triton as triton
else:
    pytest.importorskip("triton", reason="make test-triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("only Triton's interpreter works on a CPU: make test-triton", allow_module_level=True)

from benchmarks.gpu_check import device_codec
from benchmarks.gpu_check.desk import Desk
from benchmarks.gpu_check.sizes import REHEARSAL
from cake_hf.chunks.lossless_triton import TILE, decode_on_device

GUARD = 0xA5


def layout_of(tokens: int, *widths: int) -> ChunkLayout:
    return ChunkLayout(
        tokens, tuple(Piece(f"layers.{n}.keys", 1, width, torch.bfloat16, n) for n, width in enumerate(widths))
    )


def usual(layout: ChunkLayout, seed: int = 0) -> bytes:
    """Numbers like KV, with a few that are far from the others of their channel."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(layout.nbytes // 2, generator=random)
    numbers[torch.rand(numbers.shape, generator=random) < 0.02] *= 2.0**40
    return numbers.bfloat16().view(torch.uint8).numpy().tobytes()


def payload_of(encoded: Encoded, near: bool) -> tuple[torch.Tensor, EncodedSizes]:
    """The encoded payload; without its refinements if the bases alone are decoded."""
    if not near:
        return torch.frombuffer(
            bytearray(encoded.bases) + bytearray(encoded.refinements), dtype=torch.uint8
        ), encoded.sizes
    bare = EncodedSizes(encoded.sizes.bases, (0,) * len(encoded.sizes.bases))
    return torch.frombuffer(bytearray(encoded.bases), dtype=torch.uint8), bare


def decoded(
    payload: torch.Tensor, sizes: EncodedSizes, layout: ChunkLayout, near: bool = False
) -> tuple[list[bool], bytes]:
    """Which pieces are wrong, and all of them; what lies around each is still as it was."""
    room = torch.full((layout.nbytes + 64 * (len(layout.pieces) + 1),), GUARD, dtype=torch.uint8)
    places, at = [], 64
    for size in layout.sizes:
        places.append(room[at : at + size])
        at += size + 64
    wrong = decode_on_device(payload, sizes, layout, places, near=near)
    found = b"".join(place.numpy().tobytes() for place in places)
    for place in places:
        place.fill_(GUARD)
    assert (room == GUARD).all()
    return wrong.tolist(), found


def on_the_host(encoded: Encoded, layout: ChunkLayout, near: bool) -> bytes:
    room = memoryview(bytearray(layout.nbytes))
    if near:
        decode_base_into(encoded.bases, encoded.sizes, layout, split(room, layout))
    else:
        decode_into(encoded.bases, encoded.refinements, encoded.sizes, layout, split(room, layout))
    return bytes(room)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(
    ("tokens", "widths"), [(128, (192, 192)), (TILE // 64 + 1, (64, 576)), (1, (256,)), (37, (96, 7, 600)), (40, (1,))]
)
def test_it_gives_the_bits_of_the_other_decoders(tokens: int, widths: tuple[int, ...], near: bool) -> None:
    layout = layout_of(tokens, *widths)
    encoded = encode(usual(layout), layout)
    payload, sizes = payload_of(encoded, near)
    assert decoded(payload, sizes, layout, near) == ([False] * len(widths), on_the_host(encoded, layout, near))
    changed = payload.clone()
    changed[widths[0]] ^= 0x80  # the first number's sign
    assert decoded(changed, sizes, layout, near)[1] != on_the_host(encoded, layout, near)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_bits_come_back(data: Any) -> None:
    layout = layout_of(data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 3, 31, 33, 64])), 16)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    few = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=6))
    numbers = random.choice(np.array(few, np.uint16), layout.nbytes // 2)
    encoded = encode(numbers.tobytes(), layout)
    payload, sizes = payload_of(encoded, near=False)
    assert decoded(payload, sizes, layout) == ([False, False], numbers.tobytes())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_the_host_refuses_is_refused(data: Any) -> None:
    layout = layout_of(64, 32, 32)
    encoded = encode(usual(layout), layout)
    bases = bytearray(encoded.bases)
    for place in data.draw(st.lists(st.integers(0, len(bases) - 1), min_size=1, max_size=3)):
        bases[place] = data.draw(st.integers(0, 255))
    broken = Encoded(memoryview(bases), encoded.refinements, encoded.sizes)
    wrong, found = decoded(*payload_of(broken, near=False), layout)
    try:
        expected = on_the_host(broken, layout, near=False)
    except CorruptChunk:
        assert any(wrong)
    else:
        assert (wrong, found) == ([False, False], expected)


def test_sizes_that_no_encoder_gives_are_refused() -> None:
    layout = layout_of(64, 32)
    payload, sizes = payload_of(encode(usual(layout), layout), near=False)
    [base], [refinement] = sizes.bases, sizes.refinements
    for wrong in (
        EncodedSizes((64 * 32,), (base + refinement - 64 * 32,)),
        EncodedSizes((base + 1,), (refinement - 1,)),
    ):
        with pytest.raises(CorruptChunk, match="wrong size"):
            decoded(payload, wrong, layout)
    with pytest.raises(ValueError, match="sizes and places"):
        decoded(payload[:-1], sizes, layout)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cake_hf.chunks import lossless_triton

sizes = {"fields": 7, "tile_size": lossless_triton.TILE}
tables = {"payload": "*u8", "table": "*i64", "tiles": "i32"}
for kernel, results, choices in (
    (lossless_triton._count_escapes, {"counts": "*i32"}, sizes),
    (lossless_triton._decode_tiles, {"starts": "*i32", "faults": "*i32"}, {**sizes, "near": False}),
    (lossless_triton._decode_tiles, {"starts": "*i32", "faults": "*i32"}, {**sizes, "near": True}),
):
    signature = {**tables, **results, **dict.fromkeys(choices, "constexpr")}
    made = triton.compile(ASTSource(kernel, signature, choices), target=GPUTarget("cuda", 90, 32))
    print(len(made.asm["cubin"]))
"""


def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The compiler takes less of Python than the interpreter; it needs no GPU."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.split()) == 3


def test_the_gpu_check_compares_both_ways(tmp_path: Path) -> None:
    kept: list[Any] = []
    device_codec.run(Desk(REHEARSAL, time.time() + 1000, tmp_path, tmp_path, kept.append))
    assert kept[-1]["checks"] == 4
    assert kept[-1]["wrong"] == []
    assert kept[-1]["figures"]["ratio"]["value"] > 0
