"""What a cache holds when a forward starts, so that the cache can return to that state if the forward does not finish.

An interrupted forward (by Ctrl-C, an alarm, an error) has brought its tokens into some layers and not into others. torch calls
no hook after a forward that ends with a `BaseException`. So when the cache is next asked for its length, it sees from the call
stack that the forward is over, and goes back first.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from cake_hf.layers import RecurrentLayer, SlidingWindowLayer, TokenMajorLayer
from cake_hf.layers.sliding_window import Content
from cake_hf.restore.held import HeldBlocks

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
