"""Transfers scattered buffers to and from an open file, without holding the GIL and without a second copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from cake_hf.errors import CorruptChunk
from cake_hf.stores.direct import is_refusal, skip_page_cache, use_page_cache
from cake_hf.stores.pieces import Part, after

CACHED_STEP = 2**19
"""Bytes after which `arrived` is called: few enough to be still in the processor's cache when they are checked."""
DIRECT_STEP = 2**23
"""The same for direct reads, since a disk needs larger requests."""
IOV_MAX = os.sysconf("SC_IOV_MAX")


def read_scattered(
    descriptor: int,
    parts: Sequence[memoryview],
    key: str,
    offset: int = 0,
    arrived: Callable[[int], None] = lambda count: None,
) -> None:
    """Fills the parts from an offset in the file on; preadv releases the GIL and copies nothing twice.

    Data that is not in the page cache is read directly, see `direct`.

    Args:
        descriptor: descriptor of the open file.
        parts: writable buffers.
        key: the chunk's key, for the message.
        offset: offset of the first byte.
        arrived: called after each step with the number of parts that are full.

    Raises:
        CorruptChunk: the file ends before the parts are full.
    """
    step = DIRECT_STEP if skip_page_cache(descriptor, parts, offset) else CACHED_STEP
    begin, nbytes = 0, 0
    for end, part in enumerate(parts, start=1):
        nbytes += part.nbytes
        if nbytes >= step or end == len(parts):
            _fill(descriptor, parts[begin:end], nbytes, key, offset)
            arrived(end)
            begin, offset, nbytes = end, offset + nbytes, 0


def _fill(descriptor: int, parts: Sequence[memoryview], nbytes: int, key: str, offset: int) -> None:
    """Fills the parts, which have `nbytes` bytes together."""
    while nbytes:
        try:
            count = os.preadv(descriptor, parts[:IOV_MAX], offset)
        except OSError as error:
            if not is_refusal(error) or not use_page_cache(descriptor):
                raise
            continue
        if count == 0:
            raise CorruptChunk(f"Chunk {key} ended early.")
        offset += count
        nbytes -= count
        if nbytes:
            parts = after(parts, count)


def write_gathered(descriptor: int, parts: Sequence[Part]) -> None:
    """Writes the parts one after the other, without joining them in memory."""
    pending = [view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes]
    while pending:
        pending = after(pending, os.writev(descriptor, pending[:IOV_MAX]))
