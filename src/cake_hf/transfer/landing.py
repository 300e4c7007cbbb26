"""Landings of loaded chunks, and the check of what lands: in the cache's buffers, or in host memory and from there in them.

A chunk lands piece by piece, in the layout's order. A chunk that may be contested is *staged*: the main thread, which knows
when it does not write to the chunk's place itself, commits it to the buffers. On a GPU, or on several devices, every chunk
passes through host memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from cake_hf.chunks.codec import ChunkMetadata, check_header, check_pieces
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.stored_forms import EncodedPieces
from cake_hf.transfer.copy_streams import CopyStreams, SlotRing
from cake_hf.transfer.device_decoding import TRIALS, DeviceDecoder
from cake_hf.util.forks import Lock


class Landing(ABC):
    """One chunk that is being loaded.

    Attributes:
        parts: writable byte buffers, one for each wanted piece of the chunk: the first pieces of the layout.
        staged: whether the chunk waits in memory of its own until the main thread commits it.
    """

    parts: list[memoryview]
    staged: bool
    _places: Sequence[Any]
    _brought = 0

    @abstractmethod
    def commit(self, end: int) -> None:
        """Commits the first `end` parts, which hold checked pieces, unless staged. For the thread that filled them."""

    def release(self) -> None:
        """Declares that the parts are no longer written to, and that what was not committed is not wanted."""

    def decode(self, pieces: EncodedPieces) -> bool:
        """Decodes checked pieces to their places, not into the parts; False if the host has to decode into the parts.

        For the thread that would fill the parts. A `commit` is needed all the same.

        Raises:
            CorruptChunk: the bytes are not as the encoder makes them.
        """
        return False

    def payload(self) -> torch.Tensor:
        """Returns a copy of the chunk on the host, `[bytes of all parts]` uint8. For the thread that brought it, before it
        reads another one."""
        return torch.from_numpy(np.concatenate([np.frombuffer(part, np.uint8) for part in self.parts]))

    def commit_parts(self, end: int) -> None:
        """Commits the first `end` pieces of a staged chunk to the buffers. Main thread only."""
        places = self._places[self._brought : end]
        if places:
            self._bring(self._brought, places)
        self._brought = max(self._brought, end)

    def let_go(self) -> None:
        """Drops the references to the buffers: nothing more is wanted, and what was not committed stays where it is."""
        self._places = ()

    @abstractmethod
    def _bring(self, first: int, places: Sequence[Any]) -> None:
        """Copies the pieces, from number `first` on, to their places in the buffers."""


class Place(ABC):
    """Destination of the chunks of one restore.

    Attributes:
        is_read_into: whether reads that are not staged write directly to the buffers, so that a late read may do so, too.
        decodes: whether encoded chunks may be decoded here.

    Args:
        buffers: one per piece of the layout, contiguous `[1, capacity, heads, head_dim]`, each on the device of its layer.
        layout: of a chunk.
        slots: number of chunks that may be in host memory beside the KV.
        windows: the chunks whose sliding-window pieces are wanted -> where these lie in their buffers, in tokens.
        extents: for each chunk (first token, last token + 1); by default all have the layout's size.
        rooms: number of encoded chunks that may be in a device's memory at once, to be decoded there.
    """

    is_read_into: bool
    decodes = False

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        layout: ChunkLayout,
        slots: int = 1,
        windows: Mapping[int, int] | None = None,
        extents: Sequence[tuple[int, int]] | None = None,
        rooms: int = 0,
    ) -> None:
        self._layout = layout
        self._rooms = rooms
        self._windows = windows or {}
        self._extents = extents
        self._token_bytes = [size // layout.chunk_size for size in layout.sizes]
        self._buffers = [buffer.view(torch.uint8).view(-1) for buffer in buffers]
        pinned = any(buffer.device.type == "cuda" for buffer in buffers)
        self._ring = SlotRing(layout.nbytes, slots, pinned=pinned)
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Makes once, from the buffers, what this kind of place needs."""

    def layout_of(self, index: int) -> ChunkLayout:
        """Returns the layout of chunk `index`, which may be a tail."""
        start, end = self._extent(index)
        tokens, layout = end - start, self._layout
        return layout if tokens == layout.chunk_size else layout.of(tokens)

    def _extent(self, index: int) -> tuple[int, int]:
        size = self._layout.chunk_size
        return (index * size, (index + 1) * size) if self._extents is None else self._extents[index]

    def wanted(self, index: int) -> int:
        """Returns how many pieces of chunk `index` are wanted."""
        return len(self._layout.pieces) if index in self._windows else self._layout.everywhere

    def wanted_bytes(self, chunks: Iterable[int]) -> int:
        """Returns the bytes of the wanted pieces of these chunks."""
        return sum(sum(self.layout_of(index).sizes[: self.wanted(index)]) for index in chunks)

    def _spans(self, index: int) -> list[slice]:
        """Returns where in their buffers, in bytes, the wanted pieces of chunk `index` go."""
        start, end = self._extent(index)
        starts = [start] * self._layout.everywhere
        if index in self._windows:
            starts += [self._windows[index]] * (len(self._layout.pieces) - self._layout.everywhere)
        tokens = end - start
        return [slice(at * size, (at + tokens) * size) for at, size in zip(starts, self._token_bytes, strict=False)]

    @abstractmethod
    def landing(self, index: int, *, staged: bool) -> Landing:
        """Returns memory for chunk `index` to be read into. Called by the thread that reads."""

    def let_go(self) -> None:
        """Drops the buffers when nothing here is wanted any more. A landing requested later lands nowhere."""
        self._buffers = []
        self._ring.let_go()

    def catch_up(self) -> None:
        """Makes everything the model's devices compute from now on see all that was committed so far."""


class HostPlace(Place):
    """The layers' own buffers: reading a chunk commits it, unless it must be staged."""

    is_read_into = True

    def _prepare(self) -> None:
        self._views = [byte_view(buffer) for buffer in self._buffers]

    def let_go(self) -> None:
        super().let_go()
        self._views = []

    def landing(self, index: int, *, staged: bool) -> Landing:
        places = [view[span] for view, span in zip(self._views, self._spans(index), strict=False)]
        return HostLanding(places, self.layout_of(index), self._ring if staged else None)


class HostLanding(Landing):
    def __init__(self, places: list[memoryview], layout: ChunkLayout, ring: SlotRing | None) -> None:
        self._places = places
        self._ring = ring
        self._slot = None if ring is None else ring.take()
        self.staged = self._slot is not None
        self.parts = places if self._slot is None else split_payload(self._slot.memory, layout)[: len(places)]

    def commit(self, end: int) -> None:
        """Does nothing: filling the parts filled the buffers, or the staged memory."""

    def release(self) -> None:
        if self._ring is not None and self._slot is not None:
            self._ring.give_back(self._slot)

    def _bring(self, first: int, places: Sequence[memoryview]) -> None:
        for number, place in enumerate(places, first):
            _copy_on_host(place, self.parts[number])


class DevicePlace(Place):
    """A place on GPUs: chunks pass through page-locked host memory and a copy stream per GPU, while the GPUs compute.

    If all layers are on one GPU, encoded chunks that are not staged cross to it as they are (see `device_decoding`).

    Events order copies and computing (see `CopyStreams`), and a slot is not filled again before the copies from it are done. A
    read that returns after its landing was let go has written to unused host memory only. If some layers are in host memory,
    their pieces are copied by the thread that commits the chunk.
    """

    is_read_into = False
    trials = TRIALS
    _decoder: DeviceDecoder | None = None

    def _prepare(self) -> None:
        devices = {buffer.device for buffer in self._buffers}
        rooms: list[torch.Tensor] = []
        if self._rooms and len(devices) == 1 and self.trials.passed(device := devices.pop()):
            self._decoder = DeviceDecoder(device, self._layout.nbytes, self._rooms, self.trials)
            self.decodes, rooms = True, self._decoder.rooms
        self._streams = CopyStreams([*self._buffers, *rooms])

    def landing(self, index: int, *, staged: bool) -> Landing:
        places = [buffer[span] for buffer, span in zip(self._buffers, self._spans(index), strict=False)]
        layout, decoder = self.layout_of(index), None if staged else self._decoder
        return _DeviceLanding(places, layout, self._ring, self._streams, decoder, staged=staged)

    def let_go(self) -> None:
        super().let_go()
        self._decoder = None

    def catch_up(self) -> None:
        self._streams.catch_up()


class _DeviceLanding(Landing):
    def __init__(
        self,
        places: list[torch.Tensor],
        layout: ChunkLayout,
        ring: SlotRing,
        streams: CopyStreams,
        decoder: DeviceDecoder | None,
        *,
        staged: bool,
    ) -> None:
        self._places = places
        self._layout = layout
        self._ring = ring
        self._streams = streams
        self._decoder = decoder
        self._decoded: EncodedPieces | None = None  # on the device, so that the parts are empty
        self._slot = ring.take()
        self._pieces = self._slot.memory[: layout.nbytes].split(layout.sizes)
        self._copied_to: set[torch.device] = set()
        self._bringing = Lock()  # so that no copy is under way once it was let go
        self.staged = staged
        self.parts = split_payload(self._slot.memory, layout)[: len(places)]

    def decode(self, pieces: EncodedPieces) -> bool:
        decoder = self._decoder
        if decoder is None or not decoder.decode(
            pieces, self._layout, lambda: self._places, self._streams, self._bringing
        ):
            return False
        self._decoded, self._brought = pieces, pieces.count
        return True

    def payload(self) -> torch.Tensor:
        if self._decoded is not None:
            self._decoded.decode_into(self._layout, self.parts)
        return super().payload()

    def commit(self, end: int) -> None:
        if not self.staged:
            with self._bringing:
                self.commit_parts(end)

    def let_go(self) -> None:
        with self._bringing:
            super().let_go()

    def release(self) -> None:
        self._slot.copied_by(self._streams.marks(self._copied_to))
        self._ring.give_back(self._slot)

    def _bring(self, first: int, places: Sequence[torch.Tensor]) -> None:
        for device, numbered in groupby(enumerate(places, first), lambda one: one[1].device):
            there = list(numbered)
            if device.type == "cpu":
                for number, place in there:
                    _copy_on_host(byte_view(place), self.parts[number])
            else:
                self._copied_to.add(device)
                self._streams.copy([place for _, place in there], [self._pieces[number] for number, _ in there])


def _copy_on_host(target: memoryview, source: memoryview) -> None:
    """Copies with numpy: torch would wake its whole thread pool for each of these small copies."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def split_payload(payload: torch.Tensor, layout: ChunkLayout) -> list[memoryview]:
    """Returns the pieces of a flat host payload, which may be longer, as writable byte buffers."""
    view, ends = byte_view(payload), np.cumsum(layout.sizes).tolist()
    return [view[end - size : end] for end, size in zip(ends, layout.sizes, strict=True)]


def place_for(
    buffers: Sequence[torch.Tensor],
    layout: ChunkLayout,
    slots: int = 1,
    windows: Mapping[int, int] | None = None,
    extents: Sequence[tuple[int, int]] | None = None,
    rooms: int = 0,
) -> Place:
    """Returns the kind of place that fits the buffers' devices."""
    return (HostPlace if is_host_place(buffers) else DevicePlace)(buffers, layout, slots, windows, extents, rooms)


def is_host_place(buffers: Sequence[torch.Tensor]) -> bool:
    """Returns whether all these buffers are in host memory, so that chunks need not pass through other memory."""
    return all(buffer.device.type == "cpu" for buffer in buffers)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor, shared and writable."""
    return tensor.detach().view(torch.uint8).view(-1).numpy().data


class Check:
    """The check of one value: its header once, and each of its pieces once.

    Args:
        key: the requested key.
        layout: of the value.
        header: where its header lands.
        pieces: where its pieces land, in order; fewer than all if no more are wanted.

    Attributes:
        header: as given.
    """

    def __init__(self, key: str, layout: ChunkLayout, header: memoryview, pieces: Sequence[memoryview]) -> None:
        self._key = key
        self._layout = layout
        self.header = header
        self._pieces = pieces
        self._facts: ChunkMetadata | None = None
        self._checked = 0

    @property
    def pieces_of_a_chunk(self) -> int:
        """Number of all pieces of the value."""
        return len(self._layout.pieces)

    @property
    def trusts_header(self) -> bool:
        """Whether the header was checked, and is good."""
        return self._facts is not None

    def up_to(self, end: int) -> None:
        """Checks the header and the first `end` pieces, which have arrived; call it whenever more have.

        Raises:
            CorruptChunk: they are not what was requested, or not as they were written.
        """
        if self._facts is None:
            self._facts = check_header(self.header, self._key, self._layout)
        check_pieces(self._pieces[self._checked : end], self._facts, self._checked)
        self._checked = end
