"""Where a loaded chunk lands: straight in the cache's buffers, or, on a GPU, in host memory and from there to them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from cake_hf.tensors.layout import ChunkLayout


class Place(ABC):
    """Destination of the chunks of one restore.

    Args:
        buffers: one per piece of the layout, contiguous `[1, capacity, heads, head_dim]`.
        layout: of a chunk.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout) -> None:
        self._layout = layout
        self._destinations = [buffer.view(torch.uint8).view(-1) for buffer in buffers]

    @abstractmethod
    def parts(self, index: int) -> list[memoryview]:
        """Writable byte buffers for chunk `index`, one per piece of the layout."""

    @abstractmethod
    def commit(self, index: int) -> None:
        """The parts hold a checked chunk: make it visible to the device. Called by the thread that filled them."""

    def aside(self) -> torch.Tensor:
        """Host memory `[layout.nbytes]` uint8 for a chunk that may not be put into place yet."""
        return torch.empty(self._layout.nbytes, dtype=torch.uint8)

    def adopt(self, index: int, payload: torch.Tensor) -> None:
        """Put a chunk that was loaded aside into place. Called by the main thread, when it does not write there itself.

        Args:
            index: of the chunk.
            payload: `[layout.nbytes]` uint8 on the host, checked.
        """
        offset = 0
        for destination, size in zip(self._destinations, self._layout.sizes, strict=True):
            source = payload[offset : offset + size]
            destination[index * size : (index + 1) * size].copy_(source, non_blocking=True)
            offset += size


class HostPlace(Place):
    """The layers' own buffers: reading a chunk is putting it into place."""

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout) -> None:
        super().__init__(buffers, layout)
        self._views = [byte_view(buffer) for buffer in buffers]

    def parts(self, index: int) -> list[memoryview]:
        sizes = self._layout.sizes
        return [view[index * size : (index + 1) * size] for view, size in zip(self._views, sizes, strict=True)]

    def commit(self, index: int) -> None:
        """Nothing is left to do."""

    def adopt(self, index: int, payload: torch.Tensor) -> None:
        # By numpy: torch would call its whole thread team together for each of these small copies.
        for part, source in zip(self.parts(index), split_payload(payload, self._layout), strict=True):
            np.copyto(np.frombuffer(part, np.uint8), np.frombuffer(source, np.uint8))


class DevicePlace(Place):
    """Host memory per thread, copied to the device's buffers once it is checked.

    A read that comes back too late has written to host memory only, which no one looks at any more.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout) -> None:
        super().__init__(buffers, layout)
        self._device = buffers[0].device
        self._own = threading.local()

    def parts(self, index: int) -> list[memoryview]:
        if not hasattr(self._own, "staging"):
            cuda = self._device.type == "cuda"
            self._own.staging = torch.empty(self._layout.nbytes, dtype=torch.uint8, pin_memory=cuda)
            self._own.stream = torch.cuda.Stream(self._device) if cuda else None
            if cuda:
                self._own.stream.wait_stream(torch.cuda.default_stream(self._device))
        return split_payload(self._own.staging, self._layout)

    def commit(self, index: int) -> None:
        # The destinations may have been made in inference mode by the main thread; this one has to be in it, too.
        with torch.inference_mode(), torch.cuda.stream(self._own.stream):
            self.adopt(index, self._own.staging)
        if self._own.stream is not None:
            self._own.stream.synchronize()


def split_payload(payload: torch.Tensor, layout: ChunkLayout) -> list[memoryview]:
    """The pieces of a flat host payload, as writable byte buffers."""
    view, ends = byte_view(payload), np.cumsum(layout.sizes).tolist()
    return [view[end - size : end] for end, size in zip(ends, layout.sizes, strict=True)]


def place_for(buffers: Sequence[torch.Tensor], layout: ChunkLayout) -> Place:
    """The place that fits where the buffers are."""
    on_host = all(buffer.device.type == "cpu" for buffer in buffers)
    return HostPlace(buffers, layout) if on_host else DevicePlace(buffers, layout)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared and writable."""
    return tensor.detach().view(torch.uint8).view(-1).numpy().data
