"""Encoded chunks that cross to a GPU as they are stored, and are decoded there, straight into place.

The decoder (`chunks/lossless_triton.py`) needs Triton, and has not run on a GPU yet. So it is tried first: in a thread of its
own, once per process and device, on a made-up chunk whose bits are known. Until the trial is over, and if it fails, chunks are
decoded on the host.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch

from cake_hf.chunks.codec import ChunkMetadata
from cake_hf.chunks.encoded_checks import describe
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossless import CODEC, EncodedSizes, encode
from cake_hf.chunks.stored_forms import EncodedPieces
from cake_hf.errors import CorruptChunk
from cake_hf.transfer.copy_streams import CopyStreams, Slot
from cake_hf.util.forks import Lock, refusal
from cake_hf.util.interrupts import faults_suppressed, is_the_users

logger = logging.getLogger("cake_hf")


class DeviceDecoder:
    """Decodes chunks of one layout on one device, behind the copies to it.

    Args:
        device: where the chunks go.
        nbytes: of a chunk as it is.
        rooms: number of encoded chunks that may be in the device's memory at once.
        trials: told if decoding fails.

    Attributes:
        rooms: that memory, which the copy stream writes to; empty if there is too little.
    """

    def __init__(self, device: torch.device, nbytes: int, rooms: int, trials: Trials) -> None:
        self.rooms: list[torch.Tensor] = []
        with faults_suppressed(RuntimeError):
            self.rooms = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(rooms)]
        self._device = device
        self._trials = trials
        self._free = deque(self.rooms)

    def decode(
        self,
        pieces: EncodedPieces,
        layout: ChunkLayout,
        places: Callable[[], Sequence[torch.Tensor]],
        streams: CopyStreams,
        lock: AbstractContextManager[object],
    ) -> bool:
        """Decodes checked pieces to their places and waits until that is done; False if the host has to do it.

        Args:
            pieces: in host memory that is not written to meanwhile.
            layout: of the chunk.
            places: returns where the pieces go; none if they are not wanted any more.
            streams: that copy to the places.
            lock: held while the work is started, not while it is waited for.

        Raises:
            CorruptChunk: the bytes are not as the encoder makes them. The places are then undefined.
        """
        if pieces.metadata.codec != CODEC or not self._trials.passed(self._device):
            return False
        try:
            room = self._free.popleft()
        except IndexError:  # as many chunks as may be are being decoded
            return False
        try:
            with lock:
                targets = places()
                if not targets:
                    return False
                wrong = _start(pieces, layout, targets, streams, room)
            _await(streams, self._device)
        except CorruptChunk:
            raise
        except Exception as error:
            self._trials.fail(self._device, error)
            return False
        finally:
            self._free.append(room)
        if wrong.any():
            raise CorruptChunk(f"Encoded piece {int(wrong.int().argmax())} is not as the encoder makes it.")
        return True


class Trials:
    """On which devices the decoder gives the right bits."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._complaints: dict[torch.device, str | None] = {}  # None as long as it is not known

    def passed(self, device: torch.device) -> bool:
        """Returns whether this device has passed its trial. The first call starts the trial, and nothing waits for it."""
        with self._lock:
            is_first = device not in self._complaints
            complaint = self._complaints.setdefault(device, None)
        if is_first:
            # Not a daemon: Python would abort if it ended while Triton compiles, which takes a second or two.
            refusal(threading.Thread(target=self.run, args=(device,), name="cake-decoder-trial"))
        return complaint == ""

    def run(self, device: torch.device) -> str:
        """Tries the decoder on this device now. Returns what is wrong with it; empty if nothing is."""
        try:
            complaint = _complaint_of(device)
        except Exception as error:
            if is_the_users(error):
                raise
            complaint = repr(error)
        if complaint:
            self.fail(device, complaint)
        with self._lock:
            self._complaints[device] = complaint
        return complaint

    def fail(self, device: torch.device, error: object) -> None:
        """Has all chunks be decoded on the host from now on."""
        with self._lock:
            known, self._complaints[device] = self._complaints.get(device), str(error)
        if not known:
            logger.warning("Encoded chunks are decoded on the host, not on %s. %s", device, error)


TRIALS = Trials()
"""Of this process."""


def _start(
    pieces: EncodedPieces,
    layout: ChunkLayout,
    places: Sequence[torch.Tensor],
    streams: CopyStreams,
    room: torch.Tensor,
) -> torch.Tensor:
    """Starts copying and decoding. Returns `[pieces]` bool on the host: which are wrong, once all that is done."""
    from cake_hf.chunks.lossless_triton import decode_on_device

    count, near, sizes = pieces.count, pieces.are_rounded, pieces.metadata.sizes
    sizes = EncodedSizes(sizes.bases[:count], (0,) * count if near else sizes.refinements[:count])
    layout = ChunkLayout(layout.chunk_size, layout.pieces[:count])
    is_gpu = room.device.type == "cuda"
    wrong = Slot(count, pinned=is_gpu).memory.view(torch.bool)
    payload = room[: sizes.nbytes]

    def work() -> None:
        for part, source in zip(
            payload.tensor_split([sizes.base_bytes]), (pieces.bases, pieces.refinements), strict=True
        ):
            if source:
                part.copy_(torch.frombuffer(source, dtype=torch.uint8), non_blocking=is_gpu)
        found = decode_on_device(payload, sizes, layout, places, near=near)
        wrong.copy_(found, non_blocking=is_gpu)

    streams.run(room.device, work)
    return wrong


def _await(streams: CopyStreams, device: torch.device) -> None:
    for event in streams.marks([device]):
        event.synchronize()


_WIDTHS = (128, 7, 96, 16)
_TOKENS = 65
_GUARD = 64
"""Bytes around each piece of the trial's chunk, an even number, that must stay as they are."""


def _made_up() -> tuple[EncodedPieces, ChunkLayout]:
    """Returns a chunk of several tiles, with many escapes and all kinds of numbers; its last piece does not shrink."""
    layout = ChunkLayout(
        _TOKENS, tuple(Piece(f"layers.{n}.keys", 1, width, torch.bfloat16, n) for n, width in enumerate(_WIDTHS))
    )
    random = np.random.default_rng(0)
    usual = torch.from_numpy(random.standard_normal(layout.nbytes // 2)).bfloat16().view(torch.uint16).numpy()
    any_bits = random.integers(0, 2**16, len(usual), np.uint16)
    # The encoder chooses its windows by every other token: half of the others may be anything, and the piece still shrinks.
    odd = [np.repeat(np.arange(_TOKENS) % 2 == 0, width) for width in _WIDTHS]
    odd[-1][:] = True
    chosen = np.concatenate(odd) & (random.random(len(usual)) < 0.5)
    encoded = encode(np.where(chosen, any_bits, usual).tobytes(), layout)
    metadata = describe(ChunkMetadata("", "", 0, "", "", ()), encoded)
    return EncodedPieces(metadata, len(_WIDTHS), encoded.bases, encoded.refinements), layout


def _complaint_of(device: torch.device) -> str:
    """Decodes a made-up chunk on a device, and compares all bits. Returns what is wrong."""
    whole, layout = _made_up()
    spans, at = [], _GUARD
    for size in layout.sizes:
        spans.append(slice(at, at + size))
        at += size + _GUARD
    room, target = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (layout.nbytes, at))
    streams = CopyStreams([room, target])
    places = [target[span] for span in spans]

    def wrong(pieces: EncodedPieces) -> list[bool]:
        found = _start(pieces, layout, places, streams, room)
        _await(streams, device)
        return found.tolist()

    for pieces in (whole, replace(whole, refinements=memoryview(b""))):
        expected = torch.zeros(at, dtype=torch.uint8)
        pieces.decode_into(layout, [expected[span].numpy().data for span in spans])
        if any(wrong(pieces)) or not torch.equal(target.cpu(), expected):
            return "It gives other bits than the host."
    impossible = bytearray(whole.bases)
    impossible[0] = 0  # no encoder writes such a window
    if wrong(replace(whole, bases=memoryview(impossible))) != [True, *[False] * (len(_WIDTHS) - 1)]:
        return "It does not see what the host refuses."
    return ""
