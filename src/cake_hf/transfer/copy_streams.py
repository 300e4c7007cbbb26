"""Copy streams, beside the one that the model computes on: for what a restore brings to a GPU, for what is saved from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cake_hf.util.forks import Lock

_out: dict[torch.device, torch.cuda.Stream] = {}
"""What all caches save goes by these; only `copy_out` adds to them."""
_out_lock = Lock()


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

    def copy(self, places: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> None:
        """Begin to copy each piece, in host memory, to its place; all of these are on one device.

        On a GPU it goes on behind what was begun before, and the pieces are not to be written to until it is done: see `marks`.
        Elsewhere it is done on return.
        """
        stream = self._streams.get(places[0].device)
        # The places may have been made in inference mode by the main thread; whoever copies has to be in it, too.
        with torch.inference_mode():
            if stream is None:
                for place, piece in zip(places, pieces, strict=True):
                    place.copy_(piece)
                return
            # The device first: a stream's context, at its end, goes back to whatever device this thread was on.
            with torch.cuda.device(stream.device), torch.cuda.stream(stream):
                torch._foreach_copy_(list(places), list(pieces), non_blocking=True)

    def marks(self, devices: Iterable[torch.device]) -> list[torch.cuda.Event]:
        """After all copies to these devices that were begun so far."""
        return [mark(self._streams[device]) for device in devices if device in self._streams]

    def catch_up(self) -> None:
        """What the model computes from now on, on whichever device, sees all copies that were begun so far."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)


def copy_out(places: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> list[torch.cuda.Event]:
    """Begin to copy each piece, wherever it is, to its place in host memory.

    From a GPU that goes on beside what is computed there from now on. The pieces may be freed at once, but nobody may write to
    them before `let_copies_out_end` was called.

    Returns:
        When these have come, all is in its place.
    """
    marks = []
    for device in dict.fromkeys(piece.device for piece in pieces):
        here = [number for number, piece in enumerate(pieces) if piece.device == device]
        targets, sources = [places[number] for number in here], [pieces[number] for number in here]
        if device.type != "cuda":
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            continue
        stream = _stream_out(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for source in sources:
            source.record_stream(stream)
        marks.append(mark(stream))
    return marks


def let_copies_out_end() -> None:
    """What is computed from now on, on whichever GPU, waits for what `copy_out` has begun, and may change it."""
    for device, stream in list(_out.items()):
        torch.cuda.current_stream(device).wait_stream(stream)


def _stream_out(device: torch.device) -> torch.cuda.Stream:
    with _out_lock:
        if device not in _out:
            _out[device] = torch.cuda.Stream(device)
        return _out[device]


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """What is on the stream now. Who waits for it sleeps meanwhile; others would keep a processor busy with asking."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
