"""Where a loaded chunk lands: straight in the cache's buffers, or in host memory and from there in them.

It lands piece by piece, in the layout's order. A chunk that may be contested lands *aside*: the main thread, which knows when
it does not write there itself, brings it into the buffers. On a GPU every chunk comes through host memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from cake_hf.movers.slots import SlotRing
from cake_hf.tensors.layout import ChunkLayout


class Landing(ABC):
    """One chunk on its way.

    Attributes:
        parts: writable byte buffers, one per piece of the layout.
        aside: whether the chunk waits in memory of its own until the main thread adopts it.
    """

    parts: list[memoryview]
    aside: bool
    _brought = 0

    def commit(self, end: int) -> None:
        """The first `end` parts hold checked pieces: unless aside, bring them into the buffers. For who filled them."""
        if not self.aside:
            self._bring_up_to(end)

    def adopt(self, end: int) -> None:
        """Bring the first `end` pieces of a chunk that waits aside into the buffers. Main thread only."""
        self._bring_up_to(end)

    def release(self) -> None:
        """Nobody writes to the parts any more, and what was not brought into the buffers is not wanted."""

    def _bring_up_to(self, end: int) -> None:
        for number in range(self._brought, end):
            self._bring(number)
        self._brought = max(self._brought, end)

    @abstractmethod
    def _bring(self, number: int) -> None:
        """Bring one piece into its buffer."""


class Place(ABC):
    """Destination of the chunks of one restore.

    Args:
        buffers: one per piece of the layout, contiguous `[1, capacity, heads, head_dim]`.
        layout: of a chunk.
        slots: chunks that may be in host memory beside the KV.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout, slots: int) -> None:
        self._layout = layout
        self._buffers = [buffer.view(torch.uint8).view(-1) for buffer in buffers]
        self._ring = SlotRing(layout.nbytes, slots, pinned=buffers[0].device.type == "cuda")

    @abstractmethod
    def landing(self, index: int, *, aside: bool) -> Landing:
        """Memory for chunk `index` to be read into. Called by the thread that reads."""

    def catch_up(self) -> None:
        """What the caller's device computes from now on sees all that was brought so far."""


class HostPlace(Place):
    """The layers' own buffers: reading a chunk is putting it into place, unless it must wait aside."""

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout, slots: int = 1) -> None:
        super().__init__(buffers, layout, slots)
        self._views = [byte_view(buffer) for buffer in buffers]

    def landing(self, index: int, *, aside: bool) -> Landing:
        sizes = self._layout.sizes
        places = [view[index * size : (index + 1) * size] for view, size in zip(self._views, sizes, strict=True)]
        return _HostLanding(places, self._layout, self._ring if aside else None)


class _HostLanding(Landing):
    def __init__(self, places: list[memoryview], layout: ChunkLayout, ring: SlotRing | None) -> None:
        self._places = places
        self._ring = ring
        self._slot = None if ring is None else ring.take()
        self.aside = self._slot is not None
        self.parts = places if self._slot is None else split_payload(self._slot.memory, layout)

    def release(self) -> None:
        if self._ring is not None and self._slot is not None:
            self._ring.give_back(self._slot)

    def _bring(self, number: int) -> None:
        if self.aside:
            # By numpy: torch would call its whole thread team together for each of these small copies.
            np.copyto(np.frombuffer(self._places[number], np.uint8), np.frombuffer(self.parts[number], np.uint8))


class DevicePlace(Place):
    """Through page-locked host memory, and from there on a copy stream of its own, while the device computes.

    Events order the two both ways: the copies wait for what made the buffers; the main thread's device work waits, in
    `catch_up`, for the copies; and a slot is not filled again before its copy is done. A read that comes back too late has
    written to host memory only, which no one looks at any more.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout, slots: int = 1) -> None:
        super().__init__(buffers, layout, slots)
        self._device = buffers[0].device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for buffer in self._buffers:
                buffer.record_stream(self._stream)

    def landing(self, index: int, *, aside: bool) -> Landing:
        sizes = self._layout.sizes
        places = [buffer[index * size : (index + 1) * size] for buffer, size in zip(self._buffers, sizes, strict=True)]
        return _DeviceLanding(places, self._layout, self._ring, self._stream, aside=aside)

    def catch_up(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _DeviceLanding(Landing):
    def __init__(
        self,
        places: list[torch.Tensor],
        layout: ChunkLayout,
        ring: SlotRing,
        stream: torch.cuda.Stream | None,
        *,
        aside: bool,
    ) -> None:
        self._places = places
        self._ring = ring
        self._stream = stream
        self._slot = ring.take()
        self._pieces = self._slot.memory.split(layout.sizes)
        self.aside = aside
        self.parts = split_payload(self._slot.memory, layout)

    def release(self) -> None:
        if self._stream is not None and self._brought:
            self._slot.copied_by(self._stream)
        self._ring.give_back(self._slot)

    def _bring(self, number: int) -> None:
        # The destinations may have been made in inference mode by the main thread; whoever copies has to be in it, too.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._places[number].copy_(self._pieces[number], non_blocking=True)


def split_payload(payload: torch.Tensor, layout: ChunkLayout) -> list[memoryview]:
    """The pieces of a flat host payload, as writable byte buffers."""
    view, ends = byte_view(payload), np.cumsum(layout.sizes).tolist()
    return [view[end - size : end] for end, size in zip(ends, layout.sizes, strict=True)]


def place_for(buffers: Sequence[torch.Tensor], layout: ChunkLayout, slots: int = 1) -> Place:
    """The place that fits where the buffers are."""
    on_host = all(buffer.device.type == "cpu" for buffer in buffers)
    return HostPlace(buffers, layout, slots) if on_host else DevicePlace(buffers, layout, slots)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared and writable."""
    return tensor.detach().view(torch.uint8).view(-1).numpy().data
