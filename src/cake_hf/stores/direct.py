"""Transfers between scattered buffers and an open file, without holding the GIL and without a second copy.

Direct reads (O_DIRECT) bypass the page cache, for uncached data and memory that the disk can write to directly.

A cold read through the page cache copies every byte once more, on a processor that the model needs: here that took 0.3 of a
core at 1.2 GB/s, against 0.04 for direct reads at the same speed. Cached data is read from the cache, four times as fast.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence

from cake_hf.errors import CorruptChunk
from cake_hf.stores.pieces import Part, address_of, after

ALIGNMENT = 4096
"""Alignment of memory, offset and length that satisfies every disk and filesystem with direct reads."""

_LEAST_BYTES = 2**20
"""For smaller reads the checks cost more than direct reads save."""


def skip_page_cache(descriptor: int, parts: Sequence[memoryview], offset: int) -> bool:
    """Switches the descriptor to direct reads, if that helps.

    Args:
        descriptor: descriptor of a file open for reading.
        parts: writable buffers that will be filled in order.
        offset: offset in the file at which the read starts.

    Returns:
        Whether reads are direct now.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    nbytes = sum([part.nbytes for part in parts])
    if nbytes < _LEAST_BYTES or _is_cached(descriptor, offset, nbytes) or not _is_aligned(parts, offset):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:  # a filesystem without direct reads
        return False
    return True


def use_page_cache(descriptor: int) -> bool:
    """Reverts `skip_page_cache`; returns False if the descriptor's reads were not direct."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & getattr(os, "O_DIRECT", 0):
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True


def is_refusal(error: OSError) -> bool:
    """Returns whether a read failed because it was direct."""
    # EFAULT: the disk cannot write to this memory.
    return error.errno in (
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.EFAULT,
    )


def _is_aligned(parts: Sequence[memoryview], offset: int) -> bool:
    numbers = [offset, *(part.nbytes for part in parts), *(address_of(part) for part in parts if part.nbytes)]
    return all(number % ALIGNMENT == 0 for number in numbers)


def _is_cached(descriptor: int, offset: int, nbytes: int) -> bool:
    """Returns whether start, middle and end of a range can be read without waiting for a disk; True if unknown."""
    probe = bytearray(1)
    try:
        return all(
            os.preadv(descriptor, [probe], offset + place, os.RWF_NOWAIT) == 1 for place in (0, nbytes // 2, nbytes - 1)
        )
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return True


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
