"""Support for kvpress: its presses shorten a cache's content after a prompt, by hooks on the attention modules.

A press expects the whole prompt in one forward. A restored prompt comes in pieces, most of which no forward sees. So a cache's
presses are disabled during a restore, and the model's own KV is saved. After the suffix, each press is applied to the whole
content of its layer, as to a computed prompt. This works for presses that use only K and V; with others, prompts are computed
plainly.

Nothing here imports kvpress: a press is recognised by its hook, which is one of its methods.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from cake_hf.layers import TokenMajorLayer
from cake_hf.layers.compat import find_cache
from cake_hf.report import Refusal

SERVED = {"KeyDiffPress", "KnormPress", "LagKVPress", "StreamingLLMPress"}
"""Presses whose scores depend only on K and V; tests/test_kvpress.py runs each."""


@dataclass(frozen=True)
class Gate:
    """A replacement for a press's hook that calls it unless the forward's cache has `presses_rest` set.

    The state belongs to the cache, so other caches and threads are not affected. Removing the hook removes the gate.
    """

    hook: Any

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        cache = find_cache((*kwargs.values(), *args), Cache)
        return None if getattr(cache, "presses_rest", False) else self.hook(module, args, kwargs, output)


@dataclass(frozen=True)
class Pressed:
    """An attention module of transformers and the press on it."""

    module: Any
    press: Any


@dataclass(frozen=True)
class Presses:
    """The presses that are active on a model; usually none."""

    pressed: list[Pressed] = field(default_factory=list)

    @classmethod
    def on(cls, model: torch.nn.Module) -> Presses:
        """Finds the presses that are now on a model, and puts each behind a gate."""
        found = []
        for module in model.modules() if "kvpress" in sys.modules else ():
            for number, hook in list(module._forward_hooks.items()):
                inner = hook.hook if isinstance(hook, Gate) else hook
                if _is_press(press := getattr(inner, "__self__", None)):
                    found.append(Pressed(module, press))
                    module._forward_hooks[number] = hook if isinstance(hook, Gate) else Gate(hook)
        return cls(found)

    def refusal(self, layers: list[Any], *, mixed: bool) -> Refusal | None:
        """Returns why a prompt with these presses is computed plainly; None if it can be restored.

        Args:
            layers: of the cache.
            mixed: whether the prompt is padded, or belongs to a batch of different prompts.
        """
        if not self.pressed:
            return None
        if mixed:
            return Refusal("press-on-batch", "a press is at work on a batch, or on a prompt with padding")
        if other := [pressed.press for pressed in self.pressed if not _is_served(pressed.press)]:
            return Refusal(
                "press-beyond-kv",
                f"{type(other[0]).__name__} looks at more than the KV of a prompt, which is all that a restore brings",
            )
        if not all(isinstance(layers[pressed.module.layer_idx], TokenMajorLayer) for pressed in self.pressed):
            return Refusal("press-on-layers", "a press is at work on layers that do not keep every token")
        return None

    def apply(self, layers: list[Any]) -> None:
        """Applies the presses to layers that hold a whole prompt.

        Args:
            layers: of the cache.
        """
        for pressed in self.pressed:
            module, layer = pressed.module, layers[pressed.module.layer_idx]
            layer.keys, layer.values = pressed.press.compress(module, None, layer.keys, layer.values, None, {})


def _is_press(owner: Any) -> bool:
    """Returns whether a hook's owner is a press, which may be a user's own."""
    return any(base.__module__.split(".")[0] == "kvpress" for base in type(owner).__mro__)


def _is_served(press: Any) -> bool:
    return type(press).__name__ in SERVED and type(press).__module__.split(".")[0] == "kvpress"
