"""Scattered buffers, cut and copied, without anybody else having to wait for it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

Part = bytes | bytearray | memoryview


def cut(parts: Sequence[Part], sizes: Sequence[int]) -> Iterator[list[memoryview]]:
    """The parts, joined in thought, as pieces of the given sizes; each piece is a list of views without empty ones.

    Args:
        parts: byte buffers.
        sizes: bytes of each piece; together as many as the parts have.
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
    """What is left of the views once their first `count` bytes are done."""
    for position, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[position + 1 :]]
        count -= view.nbytes
    return []


def even_sizes(total: int, most: int) -> list[int]:
    """`total` as the fewest sizes that are no larger than `most`, and as equal as can be."""
    count = -(-total // most)
    return [total * (n + 1) // count - total * n // count for n in range(count)]


def copy(target: memoryview, source: memoryview) -> None:
    """Copy a piece of as many bytes. By memmove, which lets other threads run meanwhile; slice assignment does not.

    Args:
        target: writable.
        source: where it is read-only (`bytes`), its address cannot be had, and the other threads wait.
    """
    if source.readonly or not source.nbytes:
        target[:] = source
    else:
        ctypes.memmove(address_of(target), address_of(source), source.nbytes)


def joined(parts: Sequence[Part]) -> bytearray:
    """The parts, joined, in memory of their own."""
    views = [memoryview(part).cast("B") for part in parts]
    value, offset = bytearray(sum(view.nbytes for view in views)), 0
    for view in views:
        copy(memoryview(value)[offset : offset + view.nbytes], view)
        offset += view.nbytes
    return value


def address_of(view: memoryview) -> int:
    """Where writable bytes, at least one, are in memory. The caller keeps the view as long as the address is used."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
