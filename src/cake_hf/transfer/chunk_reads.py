"""Reads of chunks: raw ones straight into place, encoded ones into memory of their own and decoded from there.

A prompt's lookup says which keys are stored, not in which form. A reader expects the form that was last seen in this place of
chunks, and at first the one that the cache writes. A wrong guess costs one more read, or one more copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from cake_hf.chunks.aligned_memory import empty_aligned
from cake_hf.chunks.codec import header_size, stored_bytes
from cake_hf.chunks.encoded_header import EncodedMetadata, is_encoded
from cake_hf.chunks.layout import ChunkLayout, LayerRange
from cake_hf.chunks.lossless import CODEC
from cake_hf.chunks.stored_forms import (
    HEADER_BYTES,
    START_BYTES,
    EncodedPieces,
    can_be_encoded,
    pieces_of_file,
    refuse_newer,
    room_for,
    says_newer,
    split,
)
from cake_hf.errors import CorruptChunk, NewerChunk
from cake_hf.scheduling.costs import Brought
from cake_hf.stores.base import Store, total_bytes
from cake_hf.stores.pieces import copy
from cake_hf.transfer.copy_streams import Slot
from cake_hf.transfer.encoded_ranges import read_first_pieces
from cake_hf.transfer.landing import Check, byte_view

COMMIT_STEP = 2**23
"""Bytes of a chunk that are committed together. Each commit to a GPU runs some Python, which delays the model's launches."""

RAW_IN_A_ROW = 4
"""So many raw chunks in a row, and the next one is expected to be raw, too. Fewer would be wrong often where both are stored,
and a raw chunk that is taken for an encoded one costs only a copy."""

LEAST_SECONDS = 1e-9
"""A clock may not see the time that decoding a small chunk takes; yet the chunk was encoded."""


class Destination(Protocol):
    """The part of a `Landing` that a reader uses."""

    parts: list[memoryview]
    staged: bool

    def commit(self, end: int) -> None:
        """Takes over the first `end` parts, which hold checked pieces."""

    def decode(self, pieces: EncodedPieces) -> bool:
        """Decodes checked pieces to where they belong, other than by way of the parts; False if that cannot be done.

        Raises:
            CorruptChunk: the bytes are not as the encoder makes them.
        """


class SeenForms:
    """Remembers the form of the chunks that were last read from one place. Races between threads cost a wrong guess at most."""

    def __init__(self) -> None:
        self._raw_in_a_row: int | None = None

    def saw(self, *, encoded: bool) -> None:
        """Records a chunk that was read."""
        if encoded:
            self._raw_in_a_row = 0
        elif self._raw_in_a_row is not None:
            self._raw_in_a_row += 1
        else:
            self._raw_in_a_row = RAW_IN_A_ROW

    def expects_encoded(self, otherwise: bool) -> bool:
        """Returns whether the next chunk is probably encoded; `otherwise` if none was read yet."""
        return otherwise if self._raw_in_a_row is None else self._raw_in_a_row < RAW_IN_A_ROW


class ChunkReader:
    """The reads of one loader thread, which own the memory that they need beside the landings.

    Args:
        store: the store to read from.
        layout: the layout of a full chunk; a tail's is not larger.
        seen: the forms that were last read from that place.
        encodes: whether the cache writes encoded chunks.
        lossy: whether its codec is lossy, so that KV of other dtypes than bfloat16 may be encoded, too.
        pinned: whether encoded chunks are read into page-locked memory, since a device copies from there.
        clock: monotonic seconds.

    Attributes:
        nbytes: bytes of the store that the last chunk took.
        decoding: seconds in which it was checked and decoded; 0 if it was raw.
        working: seconds for which the thread had a processor meanwhile.
        rounded: its metadata, if only its bases were read, so that its KV is rounded; else None.
    """

    def __init__(
        self,
        store: Store,
        layout: ChunkLayout,
        seen: SeenForms,
        *,
        encodes: bool,
        lossy: bool = False,
        pinned: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nbytes, self.decoding, self.working = 0, 0.0, 0.0
        self.rounded: EncodedMetadata | None = None
        self._clock = clock
        self._store = store
        self._layout = layout
        self._seen = seen
        self._encodes = encodes
        self._lossy = lossy
        self._pinned = pinned
        self._header = byte_view(empty_aligned([header_size(layout)], torch.uint8))
        self._room: memoryview | None = None

    def read(
        self,
        key: str,
        layout: ChunkLayout,
        landing: Destination,
        ranges: Sequence[LayerRange],
        landed: Callable[[int], None],
        is_wanted: Callable[[], bool],
        *,
        bases_alone: bool = False,
    ) -> bool:
        """Reads, checks and commits a chunk; False for a miss, or if nothing is wanted any more.

        Args:
            landing: where its first pieces go; all, or fewer.
            ranges: in which it may be read if it is raw.
            landed: called with a number of layers when, of several ranges, those up to it are committed.
            is_wanted: whether bytes may still be put into the landing, if that is not memory of its own.
            bases_alone: leave out the refinements if it turns out to be encoded by the lossless codec.

        Raises:
            CorruptChunk: it is not the requested chunk, or not as it was written.
            NewerChunk: it is of a format that is not known here.
            StoreError: it cannot be read.
        """
        self.decoding, self.rounded = 0.0, None
        with self._working():
            may_be_encoded = self._lossy or can_be_encoded(layout)
            if may_be_encoded and self._seen.expects_encoded(self._encodes):
                return self._read_encoded(key, layout, landing, is_wanted, bases_alone)
            check = Check(key, layout, self._header[: header_size(layout)], landing.parts)
            try:
                found = self._read_in_place(check, key, landing, ranges, landed)
            except CorruptChunk as error:
                if check.trusts_header:
                    raise
                if not may_be_encoded:
                    refuse_newer_in(self._store, key)
                    raise
                return self._read_whole(key, layout, landing, is_wanted, error)
            if found and may_be_encoded:
                self._seen.saw(encoded=False)
            return found

    def brought(self, raw_bytes: int) -> Brought:
        """Returns what the last chunk's load brought, given the bytes that it would have had as a raw one."""
        return Brought(self.nbytes, raw_bytes, self.decoding, self.rounded is not None, self.working)

    def _read_in_place(
        self,
        check: Check,
        key: str,
        landing: Destination,
        ranges: Sequence[LayerRange],
        landed: Callable[[int], None],
    ) -> bool:
        """Reads a raw chunk whole, or range by range, or its first pieces."""
        header, count = check.header, len(landing.parts)
        self.nbytes = total_bytes([header, *landing.parts])
        if count < check.pieces_of_a_chunk:
            found = self._store.read_range(key, [header, *landing.parts], 0)
            if found:
                check.up_to(count)
                landing.commit(count)
            return found
        if len(ranges) == 1:
            return self._read_gradually(check, key, landing)
        offset = 0
        for part in ranges:
            pieces = landing.parts[part.start : part.end]
            buffers = [header, *pieces] if offset == 0 else pieces
            if not self._store.read_range(key, buffers, offset):
                return False
            check.up_to(part.end)
            landing.commit(part.end)
            landed(part.layers)
            offset += total_bytes(buffers)
        return True

    def _read_gradually(self, check: Check, key: str, landing: Destination) -> bool:
        parts, brought = landing.parts, 0

        def arrived(count: int) -> None:
            nonlocal brought
            count -= 1  # the header is the first buffer
            if not brought <= count <= len(parts):
                return  # no correct store reports that; the data is checked at the end
            check.up_to(count)  # as soon as they have arrived
            if count == len(parts) or total_bytes(parts[brought:count]) >= COMMIT_STEP:
                landing.commit(count)
                brought = count

        found = self._store.read_gradually(key, [check.header, *parts], arrived) is not None
        if found and brought < len(parts):
            arrived(1 + len(parts))  # the store has not reported it, or ignored the callback
        return found

    def _read_encoded(
        self, key: str, layout: ChunkLayout, landing: Destination, is_wanted: Callable[[], bool], bases_alone: bool
    ) -> bool:
        """Reads a chunk that is probably encoded: whole, or only what is wanted of it."""
        if (bases_alone or len(landing.parts) < len(layout.pieces)) and self._store.reads_ranges:
            try:
                found = self._read_ranges(key, layout, landing, is_wanted, bases_alone)
            except NewerChunk:
                raise
            except CorruptChunk:  # it is raw, or was replaced by one of the other form meanwhile
                found = None
            if found is not None:
                return found
        return self._read_whole(key, layout, landing, is_wanted)

    def _read_ranges(
        self, key: str, layout: ChunkLayout, landing: Destination, is_wanted: Callable[[], bool], bases_alone: bool
    ) -> bool | None:
        """Reads an encoded chunk's first pieces, or their bases alone. Returns None if its codec has no such bases."""
        count = len(landing.parts)
        read = read_first_pieces(self._store, key, layout, self._whole_room(), count, bases_alone=bases_alone)
        if read is None:
            return False
        pieces, nbytes = read
        if bases_alone and pieces.metadata.codec != CODEC:
            return None
        return self._take(pieces, nbytes, layout, landing, is_wanted)

    def _read_whole(
        self,
        key: str,
        layout: ChunkLayout,
        landing: Destination,
        is_wanted: Callable[[], bool],
        instead: CorruptChunk | None = None,
    ) -> bool:
        """Reads a chunk of either form into memory of its own, and from there into the landing.

        Args:
            key, layout, landing, is_wanted: as for `read`.
            instead: what the chunk looked like when it was read as a raw one.
        """
        room = self._whole_room()
        try:
            size = self._store.read_up_to(key, room)
        except CorruptChunk as error:
            refuse_newer_in(self._store, key)
            raise instead or error from None
        if size is None:
            return False
        raw = room[:size]
        if is_encoded(raw):
            encoded = pieces_of_file(raw, key, layout, len(landing.parts))
            return self._take(encoded, size, layout, landing, is_wanted)
        refuse_newer(raw)
        if size != (expected := stored_bytes(layout)):
            raise instead or CorruptChunk(f"Chunk {key} has {size} bytes, {expected} were expected.")
        start, count = header_size(layout), len(landing.parts)
        pieces = split(raw[start:], layout)[:count]
        Check(key, layout, raw[:start], pieces).up_to(count)
        if not _may_fill(landing, is_wanted):
            return False
        for part, piece in zip(landing.parts, pieces, strict=True):
            copy(part, piece)
        self._took(landing, size, encoded=False)
        return True

    def _take(
        self,
        pieces: EncodedPieces,
        nbytes: int,
        layout: ChunkLayout,
        landing: Destination,
        is_wanted: Callable[[], bool],
    ) -> bool:
        """Checks, decodes and commits encoded pieces; False if nothing is wanted any more."""
        if not _may_fill(landing, is_wanted):
            return False
        with self._decoding():
            pieces.check()
            if not landing.decode(pieces):
                pieces.decode_into(layout, landing.parts)
        self._took(landing, nbytes, encoded=True)
        self.rounded = pieces.metadata if pieces.are_rounded else None
        return True

    def _took(self, landing: Destination, nbytes: int, *, encoded: bool) -> None:
        landing.commit(len(landing.parts))
        self._seen.saw(encoded=encoded)
        self.nbytes = nbytes

    @contextmanager
    def _working(self) -> Iterator[None]:
        begin = time.thread_time()
        try:
            yield
        finally:
            self.working = time.thread_time() - begin

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        begin = self._clock()
        yield
        self.decoding = max(self._clock() - begin, LEAST_SECONDS)

    def _whole_room(self) -> memoryview:
        if self._room is None:
            self._room = byte_view(Slot(room_for(self._layout), pinned=self._pinned).memory)
        return self._room


def refuse_newer_in(store: Store, key: str) -> None:
    """Refuses a stored chunk that says it is of a later format version.

    Raises:
        NewerChunk: it does.
        StoreError: it cannot be read.
    """
    try:
        start = store.head(key, START_BYTES)
        length = 8 + int.from_bytes((start or b"")[:8], "little")
        if start is not None and says_newer(start) and length <= HEADER_BYTES:
            start = store.head(key, length)
    except CorruptChunk:  # too short for a chunk
        return
    if start is not None:
        refuse_newer(start)


def _may_fill(landing: Destination, is_wanted: Callable[[], bool]) -> bool:
    """Returns whether the landing may be written to: it has memory of its own, or the load was not given up."""
    return landing.staged or is_wanted()
