"""Host memory of which there is too little: what asks for it gets an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

PAGE = 4096


@contextmanager
def refusing(fail: Callable[[], object], wanted: Callable[[int, torch.dtype], bool]) -> Iterator[list[int]]:
    """In the body, `fail` is called wherever the library asks torch for memory like that: of so many bytes, and a type.

    Yields their sizes.
    """
    empty, refused = torch.empty, list[int]()

    def make(*size: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
        shape = size[0] if size and not isinstance(size[0], int) else size
        if wanted(math.prod(shape) * dtype.itemsize, dtype):
            refused.append(math.prod(shape) * dtype.itemsize)
            fail()
        return empty(*size, dtype=dtype, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", make)
        yield refused


def of_a_chunk(model: Any, chunk_size: int) -> Callable[[int, torch.dtype], bool]:
    """Whether it is memory for one chunk of a Llama in float32, which starts on a page."""
    config = model.config
    nbytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4 * chunk_size
    return lambda wanted, dtype: nbytes <= wanted <= nbytes + PAGE and dtype is torch.uint8
