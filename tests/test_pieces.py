"""Buffers cut into pieces and copied: nothing is lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cake_hf.stores.pieces import after, copy, cut, even_sizes, joined


@given(st.lists(st.binary(max_size=20), max_size=10), st.data())
def test_pieces_are_the_parts_in_order(parts: list[bytes], data: st.DataObject) -> None:
    total = sum(map(len, parts))
    edges = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=5))})
    sizes = [end - begin for begin, end in pairwise(edges)]
    pieces = list(cut(parts, sizes))
    assert [sum(view.nbytes for view in piece) for piece in pieces] == sizes
    assert b"".join(view for piece in pieces for view in piece) == b"".join(parts)
    assert all(view.nbytes for piece in pieces for view in piece)


def test_pieces_share_the_parts_memory() -> None:
    buffer = bytearray(10)
    _, (view,) = cut([memoryview(buffer)], [4, 6])
    view[0] = 7
    assert buffer[4] == 7


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=10), st.integers(0, 200))
def test_the_parts_after_a_count_are_the_remaining_bytes(parts: list[bytes], count: int) -> None:
    assert b"".join(after([memoryview(part) for part in parts], count)) == b"".join(parts)[count:]


@given(st.integers(0, 10**12), st.integers(10**9, 10**10))
def test_even_sizes_are_few_and_alike(total: int, most: int) -> None:
    sizes = even_sizes(total, most)
    assert sum(sizes) == total
    assert len(sizes) == -(-total // most)
    assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)


def test_pieces_are_copied_whatever_they_are_of() -> None:
    target = bytearray(10)
    copy(memoryview(target)[2:5], memoryview(bytearray(b"abc")))
    copy(memoryview(target)[5:7], memoryview(b"de"))
    copy(memoryview(target)[10:], memoryview(bytearray()))
    assert target == b"\0\0abcde\0\0\0"


def test_parts_of_any_buffer_type_are_joined() -> None:
    parts = [b"ab", bytearray(b"cd"), memoryview(b"xefx")[1:3], b"", memoryview(bytearray(b"gh"))]
    assert joined(parts) == b"abcdefgh"
    assert joined([]) == b""
