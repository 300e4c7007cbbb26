"""Reads past the page cache: only where they help, and always the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cake_hf.movers.place import byte_view
from cake_hf.stores import direct
from cake_hf.tensors.aligned import PAGE, empty_aligned

NBYTES = 4 * 2**20
CONTENT = os.urandom(2**16) * (NBYTES // 2**16)


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """Of a file that is on the disk and, as far as the system does as it is told, not in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    yield opened
    os.close(opened)


def buffers(nbytes: int, count: int = 1, shift: int = 0) -> list[memoryview]:
    view = byte_view(empty_aligned([nbytes + PAGE], torch.uint8))[shift:]
    size = nbytes // count
    return [view[n * size : (n + 1) * size] for n in range(count)]


def test_a_direct_read_brings_the_same_bytes(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_is_cached", lambda *_: False)
    parts = [*buffers(NBYTES // 2), *buffers(NBYTES // 2, 4)]
    if direct.skip_page_cache(descriptor, parts, 0):  # not every filesystem has it
        assert os.preadv(descriptor, parts, 0) == NBYTES
    direct.use_page_cache(descriptor)
    assert os.preadv(descriptor, parts, 0) == NBYTES
    assert b"".join(parts) == CONTENT
    assert os.preadv(descriptor, [bytearray(3)], 5) == 3  # a plain descriptor again: it takes anything


@pytest.mark.parametrize(
    ("parts", "offset"),
    [
        (buffers(NBYTES, shift=64), 0),
        (buffers(NBYTES), 512),
        (buffers(NBYTES - 3 * 512, 3), 0),
        (buffers(2**19), 0),
        ([], 0),
    ],
    ids=["memory", "offset", "length", "small", "nothing"],
)
def test_only_large_aligned_reads_are_direct(
    descriptor: int, parts: list[memoryview], offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_is_cached", lambda *_: False)
    assert direct.skip_page_cache(descriptor, parts, offset) is False


def test_what_is_in_the_page_cache_is_read_from_there(descriptor: int) -> None:
    parts = buffers(NBYTES)
    assert os.preadv(descriptor, parts, 0) == NBYTES
    assert direct.skip_page_cache(descriptor, parts, 0) is False


def test_a_filesystem_without_direct_reads_is_read_as_ever(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == direct.fcntl.F_SETFL:
            raise OSError(22, "Invalid argument")
        return 0

    monkeypatch.setattr(direct, "_is_cached", lambda *_: False)
    monkeypatch.setattr(direct.fcntl, "fcntl", refuse)
    assert direct.skip_page_cache(descriptor, buffers(NBYTES), 0) is False


@pytest.mark.parametrize("shape", [(3, 5000, 2), (1, 16, 2, 4), (0, 7), (4096,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_aligned_memory_is_a_plain_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = empty_aligned(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    if tensor.numel() * tensor.element_size() >= PAGE:
        assert tensor.data_ptr() % PAGE == 0
    tensor.fill_(1)
    assert tensor.sum() == tensor.numel()
