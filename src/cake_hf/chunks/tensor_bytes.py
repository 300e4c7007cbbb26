"""Tensors as bytes on the host, and the factors of checksums that are computed on a tensor's own device."""

from __future__ import annotations

import torch


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns a tensor's content in row-major order; a view if it already is on the host in that order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def odd_factors(count: int) -> torch.Tensor:
    """Returns `[count]` int64 factors on the host, always the same.

    An odd factor is invertible modulo 2**64, so no change of a word is lost.
    """
    generator = torch.Generator("cpu").manual_seed(0xCA4E)
    return torch.randint(-(2**62), 2**62, (count,), dtype=torch.int64, device="cpu", generator=generator) * 2 + 1
