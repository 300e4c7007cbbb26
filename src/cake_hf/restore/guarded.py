"""A `DynamicCache` that runs a check before anything is added to it, by any of its update methods."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from cake_hf.model.foreign_code import outside_graphs
from cake_hf.restore.hook import HookedCache

_PARAMETERS = ("key_states", "value_states", "layer_idx")


class GuardedCache(HookedCache):
    """A cache whose subclasses check in `_before_update` what must hold; by default nothing."""

    def _before_update(self, layer: int, *, reads: bool) -> None:
        """Called before a layer takes something in.

        Args:
            layer: its number.
            reads: the model gets back all that the layer has kept of each token, old and new.
        """

    def _before_unknown_update(self) -> None:
        """Called before an update with arguments that we do not know."""

    def _is_in_graph(self) -> bool:
        """Whether torch.compile traces the calling forward, and nothing is left to do outside of the graph."""
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
    """Whether the calling code runs within that model or one of its modules, as far as the call stack shows.

    Meant for the rare call that the model's hook did not announce: it takes some 20 microseconds per level of the stack.
    """
    callers = set()
    for frame, _ in traceback.walk_stack(None):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            callers.add(owner)
    return model in callers or any(module in callers for module in model.modules())
