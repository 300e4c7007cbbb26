"""Copies between host and GPU: slots of host memory that are reused in turn, and streams beside the model's compute stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from cake_hf.chunks.aligned_memory import empty_aligned
from cake_hf.util.forks import Lock
from cake_hf.util.interrupts import faults_suppressed


class Slot:
    """Memory for one chunk.

    Args:
        nbytes: size of the memory.
        pinned: whether it is page-locked; if the system locks no more pages, it is not, and copies take longer.

    Attributes:
        memory: `[nbytes]` uint8 on the host.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        # Not an inference tensor: threads outside inference mode write to it.
        with torch.inference_mode(False):
            locked = _locked(nbytes) if pinned else None
            self.memory = empty_aligned([nbytes], torch.uint8) if locked is None else locked
        self._copied: list[torch.cuda.Event] = []

    def copied_by(self, marks: Sequence[torch.cuda.Event]) -> None:
        """Sets the events of the copies from or to the memory that must be done before it is used again."""
        self._copied = list(marks)

    def await_copy(self) -> None:
        """Blocks until the memory may be used."""
        for copied in self._copied:
            copied.synchronize()


class SlotRing:
    """Slots that are taken, filled, copied from on the device, and given back before that copy is done.

    The slot that was given back first is taken first. New slots are made only while there are fewer than `slots`, or if all are
    taken: their users have a bound of their own. Pinned memory comes from torch's caching allocator, so the next restore's ring
    costs nothing.

    Args:
        nbytes: of a chunk.
        slots: number of slots that are reused in turn.
        pinned: whether they are page-locked, so that a device can copy from them at full speed, concurrently with other work.
    """

    def __init__(self, nbytes: int, slots: int, *, pinned: bool) -> None:
        self._nbytes = nbytes
        self._slots = slots
        self._pinned = pinned
        self._lock = Lock()
        self._free: deque[Slot] = deque()
        self._made = 0
        self._over = False

    def take(self) -> Slot:
        """Returns a slot that is not in use; may wait for the copy from it."""
        with self._lock:
            slot = self._free.popleft() if self._free and self._made >= self._slots else None
            self._made += slot is None
        if slot is None:
            return Slot(self._nbytes, pinned=self._pinned)
        slot.await_copy()
        return slot

    def give_back(self, slot: Slot) -> None:
        """Takes back a slot that the caller no longer writes to."""
        with self._lock:
            if not self._over:
                self._free.append(slot)

    def let_go(self) -> None:
        """Ends the reuse: a slot still in use is freed by its last user."""
        with self._lock:
            self._over = True
            self._free.clear()


def _locked(nbytes: int) -> torch.Tensor | None:
    with faults_suppressed(RuntimeError):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return None


_out: dict[torch.device, torch.cuda.Stream] = {}
"""The streams that all caches save through; only `copy_out` adds to them."""
_out_lock = Lock()


class CopyStreams:
    """Streams that copy to GPUs, ordered with computing by events.

    Copies wait for whatever made the buffers, and computing waits for the copies in `catch_up`.

    Args:
        buffers: destinations of the copies, on any devices. Host memory and devices other than GPUs have no stream.
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
        """Starts copying each piece, in host memory, to its place; all places are on one device.

        On a GPU the copy runs behind the earlier ones, and the pieces must not be written to until it is done: see `marks`.
        Elsewhere it is done on return.
        """
        device = places[0].device

        def copy() -> None:
            if device in self._streams:
                torch._foreach_copy_(list(places), list(pieces), non_blocking=True)
                return
            for place, piece in zip(places, pieces, strict=True):
                place.copy_(piece)

        self.run(device, copy)

    def run(self, device: torch.device, work: Callable[[], None]) -> None:
        """Starts work on a device, behind the earlier copies to it. On a device that is no GPU it is done on return."""
        stream = self._streams.get(device)
        # The main thread may have made the buffers in inference mode; the working thread must be in it, too.
        with torch.inference_mode():
            if stream is None:
                work()
                return
            # The device first: on exit, a stream's context restores the device that this thread was on.
            with torch.cuda.device(stream.device), torch.cuda.stream(stream):
                work()

    def marks(self, devices: Iterable[torch.device]) -> list[torch.cuda.Event]:
        """Returns events that follow all copies to these devices started so far."""
        return [mark(self._streams[device]) for device in devices if device in self._streams]

    def catch_up(self) -> None:
        """Makes everything the model computes from now on, on any device, see all copies started so far."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)


def copy_out(places: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> list[torch.cuda.Event]:
    """Starts copying each piece, on any device, to its place in host memory.

    From a GPU the copy runs concurrently with later computing. The pieces may be freed at once, but must not be written to
    before `let_copies_out_end` is called.

    Returns:
        Events; once they have occurred, everything is in its place.
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
    """Makes later computing, on any GPU, wait for the copies that `copy_out` started; it may then change their sources."""
    for device, stream in list(_out.items()):
        torch.cuda.current_stream(device).wait_stream(stream)


def _stream_out(device: torch.device) -> torch.cuda.Stream:
    with _out_lock:
        if device not in _out:
            _out[device] = torch.cuda.Stream(device)
        return _out[device]


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Records an event behind the stream's current work.

    A thread that waits for it sleeps; waiting for an ordinary event would keep a processor busy.
    """
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
