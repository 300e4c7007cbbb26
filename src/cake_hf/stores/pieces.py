"""Scattered buffers, cut and copied: what stores that move a value in several requests have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cake_hf.stores.base import Part


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
