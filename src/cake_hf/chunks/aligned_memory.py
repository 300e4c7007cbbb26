"""Host memory for KV, and tensors as bytes in it.

The memory is page-aligned, so that a disk can write to it directly (see `stores.direct`), and backed by huge pages. The
kernel clears memory page by page at first touch. With pages of 4 KiB that takes longer than copying a cached file there;
with pages of 2 MiB, a fraction of that time. `python -m benchmarks --only loading` measures both.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from functools import cache

import torch

PAGE = 4096
HUGE_PAGE = 2**21
_LEAST_HUGE = 2 * HUGE_PAGE
"""In smaller tensors, the edges, which stay in small pages, would make up most of the memory."""


def empty_aligned(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Works like `torch.empty`, but on the host, large tensors start on a page and very large ones on a huge page."""
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < PAGE:
        return torch.empty(*shape, dtype=dtype, device=device)
    alignment = PAGE if nbytes < _LEAST_HUGE else HUGE_PAGE
    room = torch.empty(nbytes + alignment, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % alignment
    memory = room[start : start + nbytes]
    if alignment == HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        advise(memory, mmap.MADV_HUGEPAGE)
    return memory.view(dtype).view(*shape)


def advise(memory: torch.Tensor, advice: int) -> bool:
    """Gives the kernel advice about host memory (`madvise`); False if the kernel declines it, and nothing has changed.

    Args:
        memory: contiguous; starts on a page.
        advice: one of mmap.MADV_*.
    """
    madvise = _libc().madvise
    return bool(madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), ctypes.c_int(advice)) == 0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns a tensor's content in row-major order; a view if it already is on the host in that order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def odd_factors(count: int) -> torch.Tensor:
    """Returns `[count]` int64 factors on the host, always the same.

    An odd factor is invertible modulo 2**64, so no change of a word is lost.
    """
    generator = torch.Generator("cpu").manual_seed(0xCA4E)
    return torch.randint(-(2**62), 2**62, (count,), dtype=torch.int64, device="cpu", generator=generator) * 2 + 1
