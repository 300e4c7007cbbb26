"""The prompt tokens that a cache has seen and still holds: the cache itself knows only how many tokens there are."""

from __future__ import annotations

import torch

from cake_hf.errors import CakeError


class SeenTokens:
    """Records which prompt tokens lie where in a cache; decoded tokens in between are not recorded."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, torch.Tensor]] = []

    def note(self, start: int, ids: torch.Tensor) -> None:
        """Records that tokens `[rows, new]` come into the cache, which holds `start` tokens."""
        end = self._pieces[-1][0] + self._pieces[-1][1].shape[1] if self._pieces else 0
        if start == 0 or start < end:  # something else has shortened the cache: the positions are no longer known
            self.forget()
        if start == 0 or end:
            self._pieces.append((start, ids.detach().clone()))

    def forget(self) -> None:
        """Forgets all tokens: the cache is empty, or its rows have changed."""
        self._pieces = []

    def crop(self, length: int) -> None:
        """Forgets the tokens beyond `length`, which the cache no longer holds."""
        self._pieces = [(start, ids[:, : length - start]) for start, ids in self._pieces if start < length]

    def require(self, prompt: torch.Tensor, mask: torch.Tensor | None, length: int, *, longer: bool = False) -> None:
        """Checks that the content of the cache, where it is known, is the start of a prompt.

        Args:
            prompt: `[rows, tokens]`, from its start on.
            mask: of the same shape; None if nothing is masked.
            length: tokens in the cache.
            longer: the prompt must have more tokens than the cache.

        Raises:
            CakeError: it is not.
        """
        self.crop(length)
        if any(self._differs(prompt, mask, start, ids.to(prompt.device)) for start, ids in self._pieces):
            raise CakeError(f"The cache holds {length} tokens of another prompt; make a new CakeCache for this one.")
        if longer and prompt.shape[1] <= length:
            raise CakeError(
                f"The cache holds {length} tokens, and the prompt has only {prompt.shape[1]}; make a new CakeCache for it."
            )

    def known(self, length: int) -> torch.Tensor | None:
        """Returns the first `length` tokens `[rows, length]`; None if some of them are not recorded."""
        found, end = [], 0
        for start, ids in self._pieces:
            if start == end < length:
                found.append(ids[:, : length - start])
                end = start + found[-1].shape[1]
        return torch.cat(found, dim=1) if found and end == length else None

    def copy(self) -> SeenTokens:
        """Returns an independent copy."""
        copied = SeenTokens()
        copied._pieces = list(self._pieces)
        return copied

    @staticmethod
    def _differs(prompt: torch.Tensor, mask: torch.Tensor | None, start: int, ids: torch.Tensor) -> bool:
        common = prompt[:, start : start + ids.shape[1]]
        if prompt.shape[0] != ids.shape[0] and 1 not in (prompt.shape[0], ids.shape[0]):
            return False  # we cannot compare different numbers of rows
        unequal = common != ids[:, : common.shape[1]]
        if mask is not None and mask.shape == prompt.shape:
            unequal = unequal & (mask[:, start : start + common.shape[1]] != 0)
        return bool(unequal.any())
