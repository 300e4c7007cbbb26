"""Guards of a cache: a check before each update, the thread that uses it, and the state to return to if a forward fails.

An interrupted forward (by Ctrl-C, an alarm, an error) has brought its tokens into some layers and not into others. torch calls
no hook after a forward that ends with a `BaseException`. So when the cache is next asked for its length, it sees from the call
stack that the forward is over, and goes back first.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from types import FrameType
from typing import Any

import torch

from cake_hf.blocks import HeldBlocks
from cake_hf.errors import CakeError
from cake_hf.layers import RecurrentLayer, SlidingWindowLayer, TokenMajorLayer
from cake_hf.layers.sliding_window import Content
from cake_hf.model.caller import is_used_by
from cake_hf.model.foreign_code import outside_graphs
from cake_hf.restore.hook import HookedCache
from cake_hf.util.forks import Lock

_PARAMETERS = ("key_states", "value_states", "layer_idx")


class GuardedCache(HookedCache):
    """A cache whose subclasses check in `_before_update` what must hold; by default nothing."""

    def _before_update(self, layer: int, *, reads: bool) -> None:
        """Runs before a layer takes something in.

        Args:
            layer: its number.
            reads: the model gets back all that the layer has kept of each token, old and new.
        """

    def _before_unknown_update(self) -> None:
        """Runs before an update with arguments that we do not know."""

    def _is_in_graph(self) -> bool:
        """Returns whether torch.compile traces the calling forward, and nothing is left to do outside of the graph."""
        return False

    def _as_kept(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what a layer keeps of new states `[batch, heads, new, head_dim]`: others, if some were restored."""
        return keys, values

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `DynamicCache.update`.

        Raises:
            ForeignModel: another model than the cache's own brings KV.
            ForwardPreempted: within a restore, if the chunk being computed has come from the store; never reaches the caller.
        """
        if self.passive:
            return self._update_in_graph(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            return self._update(*args, **kwargs)
        return self._update_in_graph(*args, **kwargs) if self._is_in_graph() else self._update_outside(*args, **kwargs)

    @outside_graphs
    def _before_this_update(self, layer: int, *, reads: bool) -> None:
        self._before_update(layer, reads=reads)

    def _update_in_graph(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)

    @outside_graphs
    def _update_outside(self, *args: Any, **kwargs: Any) -> Any:
        return self._update(*args, **kwargs)

    def _update(self, *args: Any, **kwargs: Any) -> Any:
        if {*_PARAMETERS[len(args) :]} - kwargs.keys():
            self._before_unknown_update()
            return super().update(*args, **kwargs)
        return self._guarded_update(*args, **kwargs)

    def _guarded_update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self._before_update(layer_idx, reads=True)
        keys, values = self._as_kept(layer_idx, key_states, value_states)
        return super().update(keys, values, layer_idx, *args, **kwargs)

    def update_indexer(
        self, indexer_key_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Same as `DynamicCache.update_indexer`; raises as `update`. The indexer comes before its layer's attention."""
        if not self._is_in_graph():
            self._before_this_update(layer_idx, reads=True)
        keys: torch.Tensor = super().update_indexer(indexer_key_states, layer_idx, *args, **kwargs)
        return keys

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Same as `DynamicCache.update_conv_state`; raises as `update`."""
        if not self._is_in_graph():
            self._before_this_update(layer_idx, reads=False)
        state: torch.Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return state

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Same as `DynamicCache.update_recurrent_state`; raises as `update`."""
        if not self._is_in_graph():
            self._before_this_update(layer_idx, reads=False)
        state: torch.Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return state


def is_within(model: torch.nn.Module) -> bool:
    """Returns whether the calling code runs within that model or one of its modules, as far as the call stack shows.

    Meant for the rare call that the model's hook did not announce: it takes some 20 microseconds per level of the stack.
    """
    callers = set()
    for frame, _ in traceback.walk_stack(None):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            callers.add(owner)
    return model in callers or any(module in callers for module in model.modules())


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
        frame = None if traced else _callers_frame()
        if not past:  # `reset` is all that going back takes
            return cls(0, held.copy(), {}, {}, frame, threading.get_ident())
        windows = {n: layer.content for n, layer in enumerate(layers) if isinstance(layer, SlidingWindowLayer)}
        replaced = {
            n: (layer.keys, layer.values)
            for n, layer in enumerate(layers)
            if isinstance(layer, TokenMajorLayer) and not layer.is_own
        }
        return cls(past, held.copy(), windows, replaced, frame, threading.get_ident())

    def is_over(self) -> bool:
        """Returns whether the forward has ended. If that cannot be determined, as in other threads, it counts as running."""
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
        """Returns whether a layer can be cut back to what it held."""
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
