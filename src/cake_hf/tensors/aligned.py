"""Host memory that begins on a page, so that a disk can write to it directly (see `stores.direct`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

PAGE = 4096


def empty_aligned(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """As `torch.empty`; on the host, large tensors begin on a page."""
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < PAGE:
        return torch.empty(*shape, dtype=dtype, device=device)
    room = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE
    return room[start : start + nbytes].view(dtype).view(*shape)
