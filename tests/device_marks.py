"""Tests that are run on each kind of device that there is."""

from __future__ import annotations

import pytest
import torch

devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
