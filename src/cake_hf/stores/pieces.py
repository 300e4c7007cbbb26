"""Cuts and copies scattered buffers, without blocking other threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

Part = bytes | bytearray | memoryview


def cut(parts: Sequence[Part], sizes: Sequence[int]) -> Iterator[list[memoryview]]:
    """Cuts the concatenated parts into pieces of the given sizes; each piece is a list of non-empty views.

    Args:
        parts: byte buffers.
        sizes: bytes of each piece; their sum is the size of all parts.
    """
    views = iter(view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes)
    rest = memoryview(b"")
    for size in sizes:
        piece = []
        while size:
            rest = rest if rest.nbytes else next(views)
            piece.append(rest[:size])
            size, rest = size - piece[-1].nbytes, rest[size:]
        yield piece


def after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Returns the views without their first `count` bytes."""
    for position, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[position + 1 :]]
        count -= view.nbytes
    return []


def even_sizes(total: int, most: int) -> list[int]:
    """Splits `total` into the fewest sizes that do not exceed `most`, as equal as possible."""
    count = -(-total // most)
    return [total * (n + 1) // count - total * n // count for n in range(count)]


def copy(target: memoryview, source: memoryview) -> None:
    """Copies bytes between views of equal size. Uses memmove, which releases the GIL; slice assignment does not.

    Args:
        target: a writable view.
        source: the view to copy. If it is read-only (`bytes`), its address is not available, so other threads wait.
    """
    if source.readonly or not source.nbytes:
        target[:] = source
    else:
        ctypes.memmove(address_of(target), address_of(source), source.nbytes)


def joined(parts: Sequence[Part]) -> bytearray:
    """Returns the concatenated parts as a new buffer."""
    views = [memoryview(part).cast("B") for part in parts]
    value, offset = bytearray(sum(view.nbytes for view in views)), 0
    for view in views:
        copy(memoryview(value)[offset : offset + view.nbytes], view)
        offset += view.nbytes
    return value


def address_of(view: memoryview) -> int:
    """Returns the address of a writable, non-empty view. The caller keeps the view as long as the address is used."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
