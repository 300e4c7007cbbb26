"""Reads past the page cache: only where they help, and always the same bytes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf.chunks import aligned_memory as aligned
from cake_hf.chunks.aligned_memory import HUGE_PAGE, PAGE, advise, empty_aligned
from cake_hf.stores import LocalStore, direct
from cake_hf.testing.contract import key_of
from cake_hf.transfer.landing import byte_view

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


def say_cached(monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    """Has the system say so of all files, whatever is in its cache."""

    def preadv(descriptor: int, parts: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and not cached:
            raise BlockingIOError
        return PREADV(descriptor, parts, offset, flags & ~os.RWF_NOWAIT)

    monkeypatch.setattr(os, "preadv", preadv)


PREADV = os.preadv


def buffers(nbytes: int, count: int = 1, shift: int = 0) -> list[memoryview]:
    view = byte_view(empty_aligned([nbytes + PAGE], torch.uint8))[shift:]
    size = nbytes // count
    return [view[n * size : (n + 1) * size] for n in range(count)]


def test_a_direct_read_brings_the_same_bytes(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    say_cached(monkeypatch, False)
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
    say_cached(monkeypatch, False)
    assert direct.skip_page_cache(descriptor, parts, offset) is False


def test_what_is_in_the_page_cache_is_read_from_there(descriptor: int) -> None:
    parts = buffers(NBYTES)
    assert os.preadv(descriptor, parts, 0) == NBYTES
    assert direct.skip_page_cache(descriptor, parts, 0) is False


def test_a_filesystem_without_direct_reads_is_read_as_ever(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(22, "Invalid argument")
        return 0

    say_cached(monkeypatch, False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
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


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages to ask for")
@pytest.mark.parametrize(("nbytes", "asks"), [(2 * HUGE_PAGE, True), (2 * HUGE_PAGE - 1, False)])
def test_large_memory_is_wanted_in_huge_pages(nbytes: int, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def note(memory: torch.Tensor, advice: int) -> bool:
        asked.append((memory.data_ptr(), memory.nbytes, advice))
        return advise(memory, advice)

    monkeypatch.setattr(aligned, "advise", note)
    tensor = empty_aligned([nbytes], torch.uint8)
    assert asked == ([(tensor.data_ptr(), nbytes, mmap.MADV_HUGEPAGE)] if asks else [])
    assert not asks or tensor.data_ptr() % HUGE_PAGE == 0


def test_advice_that_the_kernel_does_not_take_changes_nothing() -> None:
    tensor = empty_aligned([PAGE], torch.uint8).fill_(7)
    assert not advise(tensor, 10**6)
    assert tensor.sum() == 7 * PAGE


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT])
def test_a_store_reads_the_same_bytes_either_way(refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into aligned memory, with and without the page cache, and where the filesystem takes its word back."""
    store, key = LocalStore(tmp_path), key_of(1)
    store.write(key, [CONTENT])
    directs: list[int] = []

    def refuse(descriptor: int, parts: Sequence[memoryview], *rest: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            directs.append(descriptor)
            raise OSError(refusal, "refused")
        return PREADV(descriptor, parts, *rest)

    for cached in (True, False):
        say_cached(monkeypatch, cached)
        parts = [*buffers(NBYTES // 2), *buffers(NBYTES // 2, 4)]
        assert store.read_into(key, parts) == NBYTES
        assert b"".join(parts) == CONTENT
    monkeypatch.setattr(os, "preadv", refuse)
    parts = buffers(NBYTES)
    assert store.read_into(key, parts) == NBYTES
    assert b"".join(parts) == CONTENT
    assert len(directs) <= 1
