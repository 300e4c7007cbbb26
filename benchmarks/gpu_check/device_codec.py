"""Encoded chunks on their way to the GPU: decoded on the host, as restores do, or on the device, by the Triton kernels."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks.figures import Figure
from benchmarks.gpu_check.desk import Desk, NotHere
from benchmarks.settings import shape_named
from benchmarks.timing import Sample, interleave
from benchmarks.workbench import synchronize
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import Encoded, decode_into, encode
from cake_hf.chunks.stored_forms import split
from cake_hf.transfer.landing import byte_view

GIGA = 10**9


def run(desk: Desk) -> None:
    """Bring one chunk to the device in each way, in turns, and compare the bits.

    Raises:
        NotHere: there is no Triton, or nothing that it could run on.
    """
    if find_spec("triton") is None:
        raise NotHere("Triton is not installed")
    if desk.sizes.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotHere("on a CPU Triton's kernels run with TRITON_INTERPRET=1 only")
    crossing = Crossing.of(desk)
    arms = {"raw": crossing.raw, "host": crossing.by_host, "device": crossing.by_device}
    wrong = [name for name, work in arms.items() if not crossing.arrives(work)]
    desk.keep({"checks": len(arms), "wrong": wrong})
    seconds = interleave({name: partial(crossing.seconds, work) for name, work in arms.items()}, desk.sizes.repeats)
    samples = {name: Sample(tuple(found)) for name, found in seconds.items()}
    rates = {
        name: Sample(tuple(crossing.layout.nbytes / GIGA / one for one in found)) for name, found in seconds.items()
    }
    figures = {
        "raw": Figure.of("raw chunk to the device, GB/s", rates["raw"], ""),
        "host": Figure.of("lossless chunk, decoded on the host by one thread, GB/s of raw KV", rates["host"], ""),
        "device": Figure.of("lossless chunk, decoded on the device, GB/s of raw KV", rates["device"], ""),
        "ratio": Figure.ratio("seconds, decoding on the device over on the host", samples["device"], samples["host"]),
    }
    desk.keep({"checks": len(arms), "wrong": wrong, "figures": {name: one.as_dict() for name, one in figures.items()}})


@dataclass
class Crossing:
    """One chunk of the large model's shape, on both sides.

    Attributes:
        layout: of the chunk.
        encoded: the chunk.
        payload: `[layout.nbytes]` as it is, on the host.
        slot: page-locked memory of that size.
        packed: page-locked memory that holds the encoded payload.
        there: memory on the device for the chunk.
        packed_there: memory on the device for the encoded payload.
    """

    layout: ChunkLayout
    encoded: Encoded
    payload: torch.Tensor
    slot: torch.Tensor
    packed: torch.Tensor
    there: torch.Tensor
    packed_there: torch.Tensor

    @classmethod
    def of(cls, desk: Desk) -> Crossing:
        """A chunk of numbers like KV: each channel has a scale of its own."""
        sizes, shape, random = desk.sizes, shape_named(desk.sizes.shape), torch.Generator().manual_seed(0)
        dim, count = shape.hidden // shape.heads, 2 * shape.layers
        pieces = [Piece(f"layers.{n // 2}.keys", shape.kv_heads, dim, torch.bfloat16, n // 2) for n in range(count)]
        layout = ChunkLayout(sizes.chunk_size, tuple(pieces))
        scales = torch.randn(count, 1, shape.kv_heads * dim, generator=random).exp2()
        numbers = torch.randn(count, sizes.chunk_size, shape.kv_heads * dim, generator=random) * scales
        payload = numbers.bfloat16().view(torch.uint8).view(-1)
        encoded = encode(byte_view(payload), layout)
        locked = sizes.device != "cpu"
        packed = torch.empty(encoded.sizes.nbytes, dtype=torch.uint8, pin_memory=locked)
        packed.copy_(torch.frombuffer(bytearray(encoded.bases) + bytearray(encoded.refinements), dtype=torch.uint8))
        slot = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=locked)
        there = torch.empty(layout.nbytes, dtype=torch.uint8, device=sizes.device)
        return cls(layout, encoded, payload, slot, packed, there, torch.empty_like(packed, device=sizes.device))

    def raw(self) -> None:
        """The chunk as it is."""
        self.there.copy_(self.slot, non_blocking=True)

    def by_host(self) -> None:
        """Decoded into page-locked memory, and copied from there."""
        one = self.encoded
        decode_into(one.bases, one.refinements, one.sizes, self.layout, split(byte_view(self.slot), self.layout))
        self.raw()

    def by_device(self) -> None:
        """Copied as it is encoded, and decoded there."""
        from benchmarks.codec.on_device import decode_on_device

        self.packed_there.copy_(self.packed, non_blocking=True)
        decode_on_device(self.packed_there, self.encoded.sizes, self.layout, self.there.split(self.layout.sizes))

    def arrives(self, work: Callable[[], None]) -> bool:
        """Whether all bits arrive; also compiles what has to be compiled."""
        self.slot.copy_(self.payload)
        self.there.zero_()
        work()
        return torch.equal(self.there.cpu(), self.payload)

    def seconds(self, work: Callable[[], None]) -> float:
        """From the begin until it is on the device."""
        device = str(self.there.device)
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - begin
