"""The tokens that came into a cache since the last known block: the suffix of a prompt, and the tokens decoded after it.

Each of these forwards is a piece of the schedule, so that the next turn can continue from known KV: the suffix becomes a tail,
and decoded tokens are single ones. Nothing is done with them until a prompt continues from there, or the caller asks for it.
"""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.blocks import Block, blocks
from cake_hf.restore.request import understands

_OTHER_KERNELS = "output_attentions"
"""An argument with which attention may be computed in another way."""


class Turn:
    """The turn after one prompt, a single row without padding.

    Args:
        begin: tokens before the suffix.
        ids: `[1, tokens]` of the suffix; zero tokens if it is known already.
        namespace: in which the blocks before are known; empty if it was not determined.
        look: at the model's weights, when the suffix was run.

    Attributes:
        begin, namespace, look: see above.
        end: tokens up to the last one.
    """

    def __init__(self, begin: int, ids: torch.Tensor, namespace: str, look: int) -> None:
        self.begin, self.namespace, self.look = begin, namespace, look
        self.end = begin + ids.shape[1]
        self._ends = [self.end] if ids.shape[1] else []
        self._ids = [ids.clone()]
        self._numbers: list[torch.Tensor] = []
        self._unmasked: list[torch.Tensor] = []

    @property
    def device(self) -> torch.device:
        """The device of the turn's tokens."""
        return self._ids[0].device

    @property
    def first(self) -> Block | None:
        """The suffix of the prompt, if it is one forward of several tokens."""
        tokens = self._ids[0].shape[1]
        return Block(self.begin, self.begin + tokens) if tokens > 1 else None

    def decoded(self, ids: torch.Tensor, arguments: dict[str, Any], past: int) -> bool:
        """Adds a token `[1, 1]` that comes after `past` others; returns False if its KV cannot be predicted with certainty."""
        if past != self.end or ids.shape[0] != 1 or arguments.get(_OTHER_KERNELS) or not understands(arguments):
            return False
        numbers, mask = arguments.get("position_ids"), arguments.get("attention_mask")
        if numbers is not None:
            if numbers.numel() != 1:
                return False
            self._numbers.append(numbers.view(1) - past)
        if mask is not None:
            if mask.ndim != 2 or mask.shape[1] != past + 1:
                return False
            self._unmasked.append(mask.all().view(1))
        self._ids.append(ids.clone())
        self.end += 1
        self._ends.append(self.end)
        return True

    def is_plain(self) -> bool:
        """Whether each token had its own position number and saw all tokens before it. Waits for the device."""
        numbered = not self._numbers or not bool(torch.cat(self._numbers).any())
        return numbered and (not self._unmasked or bool(torch.cat(self._unmasked).all()))

    def ids(self) -> torch.Tensor:
        """Returns `[1, tokens]` of the whole turn."""
        return torch.cat(self._ids, dim=1)

    def blocks(self, size: int) -> list[Block]:
        """Returns the blocks as they are stored, counted from the prompt's first token."""
        return blocks(self.begin, self.end, self._ends, size)
