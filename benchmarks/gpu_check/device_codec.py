"""Encoded chunks on their way to the GPU, through the place that restores use: decoded on the host, or on the device."""

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
from cake_hf.chunks.codec import ChunkMetadata
from cake_hf.chunks.encoded_checks import describe
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import encode
from cake_hf.chunks.stored_forms import EncodedPieces
from cake_hf.errors import CakeError
from cake_hf.transfer.copy_streams import Slot
from cake_hf.transfer.device_decoding import TRIALS
from cake_hf.transfer.landing import DevicePlace, Landing, byte_view

GIGA = 10**9


def run(desk: Desk) -> None:
    """Bring one chunk to the device in each way, in turns, and compare the bits.

    Raises:
        NotHere: there is no Triton, or nothing that it could run on.
    """
    if find_spec("triton") is None:
        raise NotHere("Triton is not installed")
    device = torch.empty(0, device=desk.sizes.device).device
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotHere("on a CPU Triton's kernels run with TRITON_INTERPRET=1 only")
    begin = time.perf_counter()
    complaint = TRIALS.run(device)
    trial = Figure.of("trial of the decoder, with compiling", Sample((time.perf_counter() - begin,)))
    if complaint:
        desk.keep({"checks": 1, "wrong": [f"trial: {complaint}"], "figures": {"trial": trial.as_dict()}})
        return
    crossing = Crossing.of(desk, device)
    arms = {"raw": crossing.raw, "host": crossing.by_host, "device": crossing.by_device}
    wrong = [name for name, work in arms.items() if not crossing.arrives(work)]
    desk.keep({"checks": 1 + len(arms), "wrong": wrong, "figures": {"trial": trial.as_dict()}})
    seconds = interleave({name: partial(crossing.seconds, work) for name, work in arms.items()}, desk.sizes.repeats)
    samples = {name: Sample(tuple(found)) for name, found in seconds.items()}
    rates = {
        name: Sample(tuple(crossing.layout.nbytes / GIGA / one for one in found)) for name, found in seconds.items()
    }
    figures = {
        "trial": trial,
        "raw": Figure.of("raw chunk to the device, GB/s", rates["raw"], ""),
        "host": Figure.of("lossless chunk, decoded on the host by one thread, GB/s of raw KV", rates["host"], ""),
        "device": Figure.of("lossless chunk, decoded on the device, GB/s of raw KV", rates["device"], ""),
        "ratio": Figure.ratio("seconds, decoding on the device over on the host", samples["device"], samples["host"]),
    }
    shown = {name: one.as_dict() for name, one in figures.items()}
    desk.keep({"checks": 1 + len(arms), "wrong": wrong, "figures": shown})


@dataclass
class Crossing:
    """One chunk of the large model's shape, on both sides.

    Attributes:
        layout: of the chunk.
        payload: `[layout.nbytes]` as it is, on the host.
        pieces: the encoded chunk, in page-locked memory.
        buffers: of the layers, on the device.
        host: the place that decodes on the host; it has one slot.
        device: the place that decodes on the device.
    """

    layout: ChunkLayout
    payload: torch.Tensor
    pieces: EncodedPieces
    buffers: list[torch.Tensor]
    host: DevicePlace
    device: DevicePlace

    @classmethod
    def of(cls, desk: Desk, device: torch.device) -> Crossing:
        """A chunk of numbers like KV: each channel has a scale of its own."""
        sizes, shape, random = desk.sizes, shape_named(desk.sizes.shape), torch.Generator().manual_seed(0)
        heads, dim, count = shape.kv_heads, shape.hidden // shape.heads, 2 * shape.layers
        kinds = [Piece(f"layers.{n // 2}.keys", heads, dim, torch.bfloat16, n // 2) for n in range(count)]
        layout = ChunkLayout(sizes.chunk_size, tuple(kinds))
        scales = torch.randn(count, 1, heads * dim, generator=random).exp2()
        numbers = torch.randn(count, sizes.chunk_size, heads * dim, generator=random) * scales
        payload = numbers.bfloat16().view(torch.uint8).view(-1)
        encoded = encode(byte_view(payload), layout)
        locked = byte_view(Slot(encoded.sizes.nbytes, pinned=device.type == "cuda").memory)
        bases, refinements = locked[: encoded.sizes.base_bytes], locked[encoded.sizes.base_bytes :]
        bases[:], refinements[:] = encoded.bases, encoded.refinements
        metadata = describe(ChunkMetadata("", "", 0, "", "", ()), encoded)
        pieces = EncodedPieces(metadata, count, bases, refinements)
        shapes = (1, sizes.chunk_size, heads, dim)
        buffers = [torch.empty(shapes, dtype=torch.bfloat16, device=device) for _ in range(count)]
        host, there = (DevicePlace(buffers, layout, 1, rooms=rooms) for rooms in (0, 1))
        return cls(layout, payload, pieces, buffers, host, there)

    def raw(self) -> None:
        """The chunk as it is, which lies in the slot."""
        self._commit(self.host.landing(0, staged=False))

    def by_host(self) -> None:
        """Decoded into page-locked memory, and copied from there."""
        landing = self.host.landing(0, staged=False)
        self.pieces.decode_into(self.layout, landing.parts)
        self._commit(landing)

    def by_device(self) -> None:
        """Copied as it is encoded, and decoded there.

        Raises:
            CakeError: it was decoded on the host after all.
        """
        landing = self.device.landing(0, staged=False)
        if not landing.decode(self.pieces):
            raise CakeError("The device does not decode.")
        self._commit(landing)

    def _commit(self, landing: Landing) -> None:
        landing.commit(len(landing.parts))
        landing.release()

    def arrives(self, work: Callable[[], None]) -> bool:
        """Whether all bits arrive. The slot holds them only for the arm that copies it as it is."""
        landing = self.host.landing(0, staged=False)
        for part, piece in zip(landing.parts, self.payload.split(self.layout.sizes), strict=True):
            part[:] = byte_view(piece) if work == self.raw else bytes(part.nbytes)
        landing.release()
        for buffer in self.buffers:
            buffer.zero_()
        synchronize(str(self.buffers[0].device))
        work()
        synchronize(str(self.buffers[0].device))
        return torch.equal(
            torch.cat([buffer.view(torch.uint8).view(-1).cpu() for buffer in self.buffers]), self.payload
        )

    def seconds(self, work: Callable[[], None]) -> float:
        """From the begin until it is on the device."""
        device = str(self.buffers[0].device)
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - begin
