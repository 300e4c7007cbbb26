"""Where a loaded chunk lands: straight in the cache's buffers, or, on a GPU, in host memory and from there to them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from cake_hf.tensors.layout import ChunkLayout


class Place(ABC):
    """Destination of the chunks of one restore."""

    @abstractmethod
    def parts(self, index: int) -> list[memoryview]:
        """Writable byte buffers for chunk `index`, one per piece of the layout."""

    @abstractmethod
    def commit(self, index: int) -> None:
        """The parts hold a checked chunk: make it visible to the device. Called by the thread that filled them."""


class HostPlace(Place):
    """The layers' own buffers: reading a chunk is putting it into place.

    Args:
        buffers: one per piece of the layout, contiguous `[1, capacity, heads, head_dim]` on the CPU.
        layout: of a chunk.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout) -> None:
        self._views = [byte_view(buffer) for buffer in buffers]
        self._sizes = layout.sizes

    def parts(self, index: int) -> list[memoryview]:
        return [view[index * size : (index + 1) * size] for view, size in zip(self._views, self._sizes, strict=True)]

    def commit(self, index: int) -> None:
        """Nothing is left to do."""


class DevicePlace(Place):
    """Host memory per thread, copied to the device's buffers once it is checked.

    A read that comes back too late has written to host memory only, which no one looks at any more.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], layout: ChunkLayout) -> None:
        self._buffers = list(buffers)
        self._layout = layout
        self._own = threading.local()
        # Not under the caller's inference mode alone: the loader threads copy into views made here.
        self._destinations = [buffer.view(torch.uint8).view(-1) for buffer in buffers]

    def parts(self, index: int) -> list[memoryview]:
        if not hasattr(self._own, "staging"):
            cuda = self._buffers[0].device.type == "cuda"
            self._own.staging = torch.empty(self._layout.nbytes, dtype=torch.uint8, pin_memory=cuda)
            self._own.stream = torch.cuda.Stream(self._buffers[0].device) if cuda else None
            if cuda:
                self._own.stream.wait_stream(torch.cuda.default_stream(self._buffers[0].device))
        staged = byte_view(self._own.staging)
        ends = np.cumsum(self._layout.sizes).tolist()
        return [staged[end - size : end] for end, size in zip(ends, self._layout.sizes, strict=True)]

    def commit(self, index: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._own.stream):
            offset = 0
            for destination, size in zip(self._destinations, self._layout.sizes, strict=True):
                source = self._own.staging[offset : offset + size]
                destination[index * size : (index + 1) * size].copy_(source, non_blocking=True)
                offset += size
        if self._own.stream is not None:
            self._own.stream.synchronize()


def place_for(buffers: Sequence[torch.Tensor], layout: ChunkLayout) -> Place:
    """The place that fits where the buffers are."""
    on_host = all(buffer.device.type == "cpu" for buffer in buffers)
    return HostPlace(buffers, layout) if on_host else DevicePlace(buffers, layout)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared and writable."""
    return tensor.detach().view(torch.uint8).view(-1).numpy().data
