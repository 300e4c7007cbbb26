"""The tokens of the prompts that a cache holds, as far as they were seen: a cache itself knows only how many there are."""

from __future__ import annotations

import torch

from cake_hf.errors import CakeError


class SeenTokens:
    """Where in a cache which tokens of prompts lie; what was decoded in between is not noted."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, torch.Tensor]] = []

    def note(self, start: int, ids: torch.Tensor) -> None:
        """Tokens `[rows, new]` come into the cache, which holds `start` tokens."""
        end = self._pieces[-1][0] + self._pieces[-1][1].shape[1] if self._pieces else 0
        if start == 0 or start < end:  # something else has shortened the cache: where things lie is not known any more
            self.forget()
        if start == 0 or end:
            self._pieces.append((start, ids.detach().clone()))

    def forget(self) -> None:
        """The cache is empty, or its rows have changed."""
        self._pieces = []

    def crop(self, length: int) -> None:
        """The cache holds no more than `length` tokens."""
        self._pieces = [(start, ids[:, : length - start]) for start, ids in self._pieces if start < length]

    def require(self, prompt: torch.Tensor, mask: torch.Tensor | None, length: int, *, longer: bool = False) -> None:
        """What is in the cache has to be the beginning of a prompt, as far as it is known.

        Args:
            prompt: `[rows, tokens]`, from its start on.
            mask: of the same shape; None where nothing is masked.
            length: tokens in the cache.
            longer: the prompt has to have more than these.

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

    def copy(self) -> SeenTokens:
        """One that changes by itself."""
        copied = SeenTokens()
        copied._pieces = list(self._pieces)
        return copied

    @staticmethod
    def _differs(prompt: torch.Tensor, mask: torch.Tensor | None, start: int, ids: torch.Tensor) -> bool:
        common = prompt[:, start : start + ids.shape[1]]
        if prompt.shape[0] != ids.shape[0] and 1 not in (prompt.shape[0], ids.shape[0]):
            return False  # another number of rows is not for us to understand
        unequal = common != ids[:, : common.shape[1]]
        if mask is not None and mask.shape == prompt.shape:
            unequal = unequal & (mask[:, start : start + common.shape[1]] != 0)
        return bool(unequal.any())
