"""EPIC: Efficient Position-Independent Caching for Serving Large Language Models (Hu et al., ICML 2025, arXiv 2410.15332)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cake_hf.presses.blend import Blend, Joined
from cake_hf.presses.layers import PressedLayer


@dataclass(frozen=True)
class EPIC(Blend):
    """Computes the first tokens of each document but the first again, which a document stored alone makes attention sinks of.

    This is LegoLink (section 4 of the paper): `tokens` of each document, wherever it stands, so the cost does not grow with
    its length. With all tokens computed again the cache is bit for bit that of the first document with the others run on it,
    each in one forward.

    Args:
        tokens: of each document.
    """

    tokens: int = 16

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens is not negative; got {self.tokens!r}.")

    def chosen(self, joined: Joined, fresh: list[PressedLayer]) -> torch.Tensor:
        return joined.places[: self.tokens]
