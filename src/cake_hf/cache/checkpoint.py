"""What a cache holds when a forward begins, so that it can go back there if the forward does not end.

A forward that is left half way (by Ctrl-C, an alarm, an error) has brought its tokens into some layers and not into others.
torch calls no hook behind a forward that ends by a `BaseException`. So when the cache is next asked for its length, it sees
from the call stack that the forward is over, and goes back first.
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
from cake_hf.restore.held import Held

_BETWEEN = ("cake_hf", "torch._dynamo", "contextlib")
"""Modules whose frames may lie between a forward and its hooks, and end with the hook."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a cache when a forward of its model began.

    Attributes:
        past: tokens in the cache.
        held: what is known of its content.
        windows: what windowed layers held, by number. These tensors are not written to.
        replaced: K and V of layers whose content was not in their own buffers, by number. Nor are these.
        frame: that ends when the forward does; None where torch.compile has traced the call, and frames tell nothing.
        thread: in which the forward runs.
    """

    past: int
    held: Held
    windows: dict[int, Content]
    replaced: dict[int, tuple[Any, Any]]
    frame: FrameType | None
    thread: int

    @classmethod
    def take(cls, layers: Sequence[Any], past: int, held: Held, *, traced: bool = False) -> Checkpoint:
        """To be called by the hook in front of the forward."""
        windows = {n: layer.content for n, layer in enumerate(layers) if isinstance(layer, SlidingWindowLayer)}
        replaced = {
            n: (layer.keys, layer.values)
            for n, layer in enumerate(layers)
            if isinstance(layer, TokenMajorLayer) and not layer.is_own
        }
        return cls(past, held.copy(), windows, replaced, None if traced else _callers_frame(), threading.get_ident())

    def is_over(self) -> bool:
        """Whether the forward does not run any more. Where that cannot be told, as in other threads, it counts as running."""
        if self.frame is None or threading.get_ident() != self.thread:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return False
            frame = frame.f_back
        return True

    def go_back(self, layers: Sequence[Any]) -> bool:
        """Puts the content of layers back; False if some cannot go back, since each token overwrites their states."""
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
        """Whether a layer can be cut to what it held."""
        if isinstance(layer, SlidingWindowLayer) or number in self.replaced:
            return True
        if not isinstance(layer, TokenMajorLayer):
            return not getattr(layer, "is_initialized", False)
        return not layer.is_initialized or layer.has_room(self.past)


def _callers_frame() -> FrameType:
    """The innermost frame that is not ours, nor of what torch may put around a hook."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_BETWEEN):
        frame = frame.f_back
    return frame
