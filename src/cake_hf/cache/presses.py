"""kvpress beside us: its presses shorten what a cache holds, by hooks on the attention modules, when a prompt is through.

A press expects the whole prompt in one forward. A restored prompt comes in pieces, most of which no forward sees. So while a
prompt is restored its presses rest, and what is saved is the model's own KV. When the last piece is through, each press is
applied to all that its layer holds, as it would be to a prompt that was computed. That serves presses that look at K and V
alone; with others prompts are computed plainly.

Nothing here imports kvpress: a press is known by its hook, which is a method of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cake_hf.cache.layers import TokenMajorLayer

if TYPE_CHECKING:
    from cake_hf.cache.call import ForwardCall

SERVED = {"KeyDiffPress", "KnormPress", "LagKVPress", "StreamingLLMPress"}
"""Presses whose scores follow from K and V alone; tests/test_kvpress.py runs each."""


@dataclass(frozen=True)
class Pressed:
    """One module with a press on it.

    Attributes:
        module: an attention module of transformers.
        number: of the hook among the module's forward hooks.
        hook: the press's method that is the hook.
    """

    module: Any
    number: int
    hook: Any

    @property
    def press(self) -> Any:
        """The press itself."""
        return self.hook.__self__


@dataclass(frozen=True)
class Presses:
    """The presses that are at work on a model: none, as a rule."""

    pressed: list[Pressed] = field(default_factory=list)

    @classmethod
    def on(cls, model: torch.nn.Module) -> Presses:
        """Those on that model now."""
        if "kvpress" not in sys.modules:
            return cls()
        return cls(
            [
                Pressed(module, number, hook)
                for module in model.modules()
                for number, hook in module._forward_hooks.items()
                if type(getattr(hook, "__self__", None)).__module__.startswith("kvpress.")
            ]
        )

    def reason(self, call: ForwardCall, layers: list[Any]) -> str:
        """Why a prompt with these presses is computed plainly; empty if it can be restored.

        Args:
            call: that brought it.
            layers: of the cache.
        """
        if not self.pressed:
            return ""
        if call.is_batch and not call.is_repeated:
            return "a press is at work on a batch, or on a prompt with padding"
        if other := sorted({type(one.press).__name__ for one in self.pressed} - SERVED):
            return f"{other[0]} looks at more than the KV of a prompt, which is all that a restore brings"
        if not all(isinstance(layers[one.module.layer_idx], TokenMajorLayer) for one in self.pressed):
            return "a press is at work on layers that do not keep every token"
        return ""

    def rest(self) -> None:
        """Have the hooks do nothing until `resume`."""
        for one in self.pressed:
            one.module._forward_hooks[one.number] = _resting

    def resume(self) -> None:
        """Have the hooks at work again, but for those that were removed meanwhile."""
        for one in self.pressed:
            if one.module._forward_hooks.get(one.number) is _resting:
                one.module._forward_hooks[one.number] = one.hook

    def apply(self, layers: list[Any]) -> None:
        """Shorten what the layers hold of a whole prompt.

        Args:
            layers: of the cache.
        """
        for one in self.pressed:
            layer = layers[one.module.layer_idx]
            layer.keys, layer.values = one.press.compress(one.module, None, layer.keys, layer.values, None, {})


def _resting(*_: Any) -> None:
    """In place of a press's hook."""
