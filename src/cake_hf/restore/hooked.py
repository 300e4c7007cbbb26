"""What the hook on a model knows of a cache of ours. It imports no restore: the cache says by its class that it is one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

Rewritten = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, positional and named, that a forward gets instead of its own."""


class HookedCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed for us
    """A cache that is told before and after each forward of its model; `RestoringCache` is the one there is.

    The attributes are plain ones, since torch.compile traces what asks for them.

    Attributes:
        passive: it is no more than the cache that it is derived from.
        in_front: what runs is compiled code, which `hook.InFront` has called.
    """

    passive = False
    in_front = False

    @property
    def _busy(self) -> bool:
        """Whether a restore is running: its forwards pass the hook untouched."""
        return False

    def is_over(self) -> bool:
        """Whether the hooks have nothing to do with it any more."""
        return False

    def is_inside(self) -> bool:
        """Whether a forward of the cache's model runs."""
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
        """A forward begins; None leaves it untouched.

        Args:
            model: whose forward it is.
            args: positional arguments of the call.
            kwargs: named ones.
            traced: torch.compile traces the call.
            compiled: compiled code will run it.
        """
        raise NotImplementedError

    def _leave_model(self, model: torch.nn.Module, *, failed: bool) -> None:
        """A forward has ended."""
        raise NotImplementedError

    def _enter_decoder(self) -> None:
        """A forward of the model's decoder begins, be it within the model's own."""
        raise NotImplementedError

    def _leave_decoder(self, *, failed: bool) -> None:
        """It has ended."""
        raise NotImplementedError

    def _note_bypassed(self, ids: torch.Tensor) -> None:
        """The model is called with these tokens and without this cache, although `generate` was given it."""
        raise NotImplementedError
