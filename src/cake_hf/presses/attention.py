"""How a pressed layer takes part in attention: a function that transformers calls in place of the model's own.

A model finds its attention function by a name in its config. While a pressed cache lives, the config of each attention module
is replaced by one that differs only in this name. The function registered under it passes every call on to the model's own
function, unchanged, except for a call with the keys that a `PressedCache.update` of the same thread has just returned: that one
goes to the layer. So other caches and threads compute as before, and the model's own config, of which masks are made and which
is part of keys, stays as it is.

`attended` is attention for presses that need the weights, or keys that differ from one query head to the next.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from cake_hf.errors import CakeError
from cake_hf.layers.compat import attention_functions, eager_attention
from cake_hf.util.forks import FinalizerLock

NAME = "cake_hf_press"
SERVED = ("eager", "sdpa")
"""Attention implementations whose masks are understood here."""
_NOT_CALLED = "This model's attention does not go through transformers' attention functions, so no press works on it."


Attended = tuple[torch.Tensor, torch.Tensor | None]
"""The output `[1, new, heads, head_dim]` of attention, and its weights or None."""


@dataclass(frozen=True)
class Attention:
    """The model's own attention function for one forward of one layer.

    Attributes:
        module: the attention module.
        function: as transformers defines it.
        options: named arguments of the call, such as `scaling`.
    """

    module: Any
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> Attended:
        """Returns what the model's function returns."""
        result: Attended = self.function(self.module, query, keys, values, mask, **self.options)
        return result

    @property
    def scaling(self) -> float:
        """What the products of queries and keys are multiplied by."""
        scaling = self.options.get("scaling")
        return float(self.module.head_dim**-0.5 if scaling is None else scaling)

    def require_plain(self, press: str) -> None:
        """Checks that attention is a softmax of scaled products and nothing else, for a layer that computes it itself.

        Raises:
            CakeError: it is not.
        """
        for name in ("softcap", "s_aux", "position_bias"):
            if self.options.get(name) is not None:
                raise CakeError(f"{press} computes attention itself, and this model's attention has a {name}.")


class AttentionCall(NamedTuple):
    """What a layer is asked to compute.

    Attributes:
        attention: the model's own function.
        query: `[1, heads, new, head_dim]`.
        keys, values: as the layer's `update` returned them; the last `new` entries are of the new tokens.
        mask: the model's mask, made for the first layer.
    """

    attention: Attention
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None


class Attending(Protocol):
    """A layer that takes part in attention."""

    def attend(self, call: AttentionCall) -> Attended:
        """Computes the attention of one forward."""
        ...


class Watched:
    """Stands in for the config of an attention module; only the name of the attention function is another.

    Copies and pickles of a module get the plain config.
    """

    __slots__ = ("plain", "users")
    _attn_implementation = NAME

    def __init__(self, plain: Any) -> None:
        object.__setattr__(self, "plain", plain)
        object.__setattr__(self, "users", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.plain, name, value)

    def __reduce__(self) -> Any:
        return _itself, (self.plain,)

    def use(self, change: int) -> int:
        """Counts one more or one less pressed cache; returns how many there are."""
        object.__setattr__(self, "users", self.users + change)
        return int(self.users)


class _Next(threading.local):
    """The layer whose attention comes next in this thread, and the keys that it will come with."""

    layer: Attending | None = None
    keys: torch.Tensor | None = None


_lock = FinalizerLock()
_next = _Next()


def expect(layer: Attending, keys: torch.Tensor, *, first: bool) -> None:
    """Sends this thread's attention call with these keys to a layer.

    Args:
        layer: a layer of a pressed cache.
        keys: that its update returned.
        first: it is a forward's first layer, so what an earlier forward left, which ended with an error, is dropped.

    Raises:
        CakeError: the layer before was not called, so this model does not call the functions that transformers registers.
    """
    missed = _next.layer is not None and not first
    _next.layer, _next.keys = (None, None) if missed else (layer, keys)
    if missed:
        raise CakeError(_NOT_CALLED)


def watch(model: torch.nn.Module, cache: object) -> None:
    """Makes the attention of a model go through `attend` for as long as a cache lives.

    Raises:
        CakeError: the model's attention implementation is not one of `SERVED`.
    """
    modules = attention_modules(model)
    for module in modules:
        name = _plain(module.config)._attn_implementation or "eager"
        if name not in SERVED:
            raise CakeError(f"Presses work with the attention implementations eager and sdpa; this model uses {name}.")
    with _lock:
        if NAME not in attention_functions():
            attention_functions().register(NAME, attend)
        for module in modules:
            if not isinstance(module.config, Watched):
                module.config = Watched(module.config)
            module.config.use(+1)
    weakref.finalize(cache, _lock.soon, lambda: _release(modules)).atexit = False


def attention_modules(model: torch.nn.Module) -> list[Any]:
    """Returns the modules that look up an attention function, in the order of their layers."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(getattr(module, "config", None), "_attn_implementation")
    ]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> Attended:
    """The registered function: the layer's own attention if it expects a call, or else the model's."""
    attention = Attention(module, _function_of(module), options)
    layer = _next.layer
    if layer is None or key is not _next.keys:
        return attention(query, key, value, attention_mask)
    _next.layer = _next.keys = None
    return layer.attend(AttentionCall(attention, query, key, value, attention_mask))


def _release(modules: list[Any]) -> None:
    for module in modules:
        if isinstance(module.config, Watched) and not module.config.use(-1):
            module.config = module.config.plain


def _function_of(module: Any) -> Callable[..., Any]:
    name = _plain(module.config)._attn_implementation
    function = eager_attention(module) if name in (None, "eager") else attention_functions()[name]
    if function is None:
        raise CakeError(_NOT_CALLED)
    return function


def _plain(config: Any) -> Any:
    return config.plain if isinstance(config, Watched) else config


def _itself(thing: Any) -> Any:
    return thing


def grouped(query: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns queries `[1, heads, group, new, head_dim]`: by the key head that they use."""
    by_head: torch.Tensor = query.unflatten(1, (heads, -1))
    return by_head


def attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output `[1, new, query heads, head_dim]`, and the weights `[1, heads, group, new, kept]` in float32.

    Args:
        query: as `grouped` returns it.
        keys, values: `[1, heads, 1 or group, kept, head_dim]`.
        scaling: what the products are multiplied by.
        mask: additive, `[1, 1, new, kept]`, or None.
    """
    return weighed(query @ keys.transpose(-1, -2) * scaling, values, mask)


def weighed(scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `attended` returns, from scaled products `[1, heads, group, new, kept]`."""
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    output = weights.to(values.dtype) @ values
    return output.flatten(1, 2).transpose(1, 2).contiguous(), weights
