"""Copy streams: one for each GPU that buffers of a cache lie on, beside the one that the model computes on there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


class CopyStreams:
    """Events order copies and computing both ways: copies wait for what made the buffers, computing waits in `catch_up`.

    Args:
        buffers: that are copied to, on any devices. Host memory, and devices other than GPUs, have no stream.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        gpus = dict.fromkeys(buffer.device for buffer in buffers if buffer.device.type == "cuda")
        self._streams = {device: torch.cuda.Stream(device) for device in gpus}
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for buffer in buffers:
            if buffer.device in self._streams:
                buffer.record_stream(self._streams[buffer.device])

    def on(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream for copies to that device."""
        return self._streams.get(device)

    def of(self, places: Iterable[torch.Tensor]) -> list[torch.cuda.Stream]:
        """The streams for copies to these places, each once."""
        return [self._streams[device] for device in {place.device for place in places} if device in self._streams]

    def catch_up(self) -> None:
        """What the model computes from now on, on whichever device, sees all copies that were begun so far."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
