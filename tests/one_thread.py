"""For tests that measure. A test module that wants it says `pytest_plugins = ["one_thread"]` and marks what it is for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model is faster on one thread, above all where other programs run, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
