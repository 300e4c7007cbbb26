"""One forward with a cache: which thread uses the cache, and the state to return to if the forward does not finish.

An interrupted forward (by Ctrl-C, an alarm, an error) has brought its tokens into some layers and not into others. torch calls
no hook after a forward that ends with a `BaseException`. So when the cache is next asked for its length, it sees from the call
stack that the forward is over, and goes back first.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from types import FrameType
from typing import Any

import torch

from cake_hf.errors import CakeError
from cake_hf.layers import RecurrentLayer, SlidingWindowLayer, TokenMajorLayer
from cake_hf.layers.sliding_window import Content
from cake_hf.model.caller import is_used_by
from cake_hf.restore.held import HeldBlocks
from cake_hf.util.forks import Lock

_BETWEEN = ("cake_hf", "torch._dynamo", "contextlib")
"""Modules whose frames may lie between a forward and its hooks, and end with the hook."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a cache at the start of a forward of its model.

    Attributes:
        past: tokens in the cache.
        held: what is known of its content.
        windows: what the sliding-window layers held, by layer number. These tensors are not written to.
        replaced: K and V of layers whose content was not in their own buffers, by layer number. These are not written to
            either.
        frame: the frame that ends when the forward does; None if torch.compile has traced the call, since frames then say
            nothing.
        thread: in which the forward runs.
    """

    past: int
    held: HeldBlocks
    windows: dict[int, Content]
    replaced: dict[int, tuple[Any, Any]]
    frame: FrameType | None
    thread: int

    @classmethod
    def take(cls, layers: Sequence[Any], past: int, held: HeldBlocks, *, traced: bool = False) -> Checkpoint:
        """Records the current state. The hook before the forward calls it."""
        windows = {n: layer.content for n, layer in enumerate(layers) if isinstance(layer, SlidingWindowLayer)}
        replaced = {
            n: (layer.keys, layer.values)
            for n, layer in enumerate(layers)
            if isinstance(layer, TokenMajorLayer) and not layer.is_own
        }
        return cls(past, held.copy(), windows, replaced, None if traced else _callers_frame(), threading.get_ident())

    def is_over(self) -> bool:
        """Whether the forward has ended. If that cannot be determined, as in other threads, it counts as running."""
        if self.frame is None or threading.get_ident() != self.thread:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return False
            frame = frame.f_back
        return True

    def go_back(self, layers: Sequence[Any]) -> bool:
        """Restores the content of the layers; False if some cannot go back, since each token overwrites their states."""
        if any(isinstance(layer, RecurrentLayer) or not self._holds(n, layer) for n, layer in enumerate(layers)):
            return False
        for number, layer in enumerate(layers):
            if isinstance(layer, SlidingWindowLayer):
                layer.put(self.windows[number])
            elif number in self.replaced:
                layer.keys, layer.values = self.replaced[number]
            elif isinstance(layer, TokenMajorLayer) and layer.is_initialized:
                layer.show(self.past)
        return True

    def _holds(self, number: int, layer: Any) -> bool:
        """Whether a layer can be cut back to what it held."""
        if isinstance(layer, SlidingWindowLayer) or number in self.replaced:
            return True
        if not isinstance(layer, TokenMajorLayer):
            return not getattr(layer, "is_initialized", False)
        return not layer.is_initialized or layer.has_room(self.past)


def _callers_frame() -> FrameType:
    """Returns the innermost frame that is neither ours nor belongs to what torch may put around a hook."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_BETWEEN):
        frame = frame.f_back
    return frame


_lock = Lock()


class User:
    """The thread that used a cache last. Threads may take turns; two at once would change what the other relies on."""

    def __init__(self) -> None:
        self._thread = 0
        self._copying = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> User:
        """Returns a new `User`, since a copy of a cache has not been used yet."""
        return User()

    @property
    def is_here(self) -> bool:
        """Whether that thread is the calling one."""
        return self._thread == get_ident()

    def claim(self, model: torch.nn.Module, cache: Any) -> None:
        """Makes the calling thread the user of the cache from now on.

        Args:
            model: whose forward, or `generate`, is called with the cache.
            cache: whose user this is.

        Raises:
            CakeError: another thread is still using it.
        """
        if self.is_here:
            return
        with _lock:
            self._require_idle(model, cache)
            self._thread = get_ident()

    @contextmanager
    def copying(self, model: torch.nn.Module, cache: Any) -> Iterator[None]:
        """Guards a copy of the cache's content; any number of threads may copy it, one after another.

        Args:
            model: of the cache.
            cache: whose user this is.

        Raises:
            CakeError: another thread is changing the content.
        """
        with self._copying:
            if not self.is_here:
                self._require_idle(model, cache)
            yield

    def _require_idle(self, model: torch.nn.Module, cache: Any) -> None:
        if self._thread and is_used_by(self._thread, model, cache):
            raise CakeError("Another thread is using this CakeCache; make one for each thread.")
