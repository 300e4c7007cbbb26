"""The interface between our caches and the hook on a model, which recognizes them by this class. Imports no restore code."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

Rewritten = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, positional and by keyword, that a forward gets instead of its own."""


class HookedCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed for us
    """A cache that is called before and after each forward of its model; `RestoringCache` is the only subclass in use.

    The attributes are plain ones, since torch.compile traces the code that reads them.

    Attributes:
        passive: the cache is no more than its base class, `DynamicCache`.
        in_front: compiled code is running, called by `hook.InFront`.
    """

    passive = False
    in_front = False

    @property
    def _busy(self) -> bool:
        """Whether a restore is running: its forwards pass the hook unchanged."""
        return False

    def is_over(self) -> bool:
        """Whether the hooks have nothing more to do for this cache."""
        return False

    def is_inside(self) -> bool:
        """Whether a forward of the cache's model is running."""
        return False

    def _enter_model(
        self,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        traced: bool = False,
        compiled: bool = False,
    ) -> Rewritten | None:
        """Handles the start of a forward; returns None to leave it unchanged.

        Args:
            model: whose forward it is.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            traced: torch.compile traces the call.
            compiled: compiled code will run it.
        """
        raise NotImplementedError

    def _leave_model(self, model: torch.nn.Module, *, failed: bool) -> None:
        """Handles the end of a forward."""
        raise NotImplementedError

    def _enter_decoder(self) -> None:
        """Handles the start of a forward of the model's decoder, possibly within the model's own forward."""
        raise NotImplementedError

    def _leave_decoder(self, *, failed: bool) -> None:
        """Handles the end of a forward of the model's decoder."""
        raise NotImplementedError

    def _note_bypassed(self, ids: torch.Tensor) -> None:
        """Notes that the model is called with these tokens and without this cache, although `generate` was given it."""
        raise NotImplementedError
