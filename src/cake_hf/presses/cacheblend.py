"""CacheBlend: Fast LLM Serving for RAG with Cached Knowledge Fusion (Yao et al., EuroSys 2025, arXiv 2405.16444)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cake_hf.presses.blend import Blend, Joined
from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import check_share


@dataclass(frozen=True)
class CacheBlend(Blend):
    """Computes the tokens again whose stored KV deviates most from what the model makes of them in the whole prompt.

    The first two layers' KV is computed for all tokens. The deviation of a token is `||V - V_stored||^2` in the second layer
    (section 4.3 of the paper; as in its code, one choice is made for all layers). With all tokens computed again the cache is
    bit for bit that of the first document with the others run on it, each in one forward.
    Other than in the paper the share is that of each document, so that one is done while the next one loads.

    Args:
        ratio: share of the tokens of each document behind the first that is computed again.
    """

    ratio: float = 0.15
    compared = 1

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def chosen(self, joined: Joined, fresh: list[PressedLayer]) -> torch.Tensor:
        old, new = (
            states[0, :, joined.start :].float() for states in (joined.values[len(fresh) - 1], fresh[-1].values)
        )
        deviation = (new - old).square().sum(dim=(0, 2))
        most = deviation.topk(int(len(deviation) * self.ratio)).indices
        return joined.places[most.sort().values]
