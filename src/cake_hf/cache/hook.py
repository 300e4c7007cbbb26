"""The one hook on a model: it sees each forward, and hands those that bring a `CakeCache` to that cache.

The hook is there as long as a session of the model is open. It holds no cache, and a forward with any other cache, or none,
passes untouched.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from cake_hf.arithmetic.turns import Turns
from cake_hf.cache.caller import cache_given_to_generate
from cake_hf.cache.compat import find_cache, renamed_for
from cake_hf.cache.graphs import outside_graphs
from cake_hf.cache.images import ImageDeferral
from cake_hf.cache.vision import family_of

if TYPE_CHECKING:
    from cake_hf.cache.restoring import RestoringCache

_hooks: weakref.WeakKeyDictionary[torch.nn.Module, ModelHook] = weakref.WeakKeyDictionary()
_turns = Turns()


class ModelHook:
    """Forward hooks on a model and on its decoder, counted: the last `detach` removes them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._users = 0
        _forget_copied(model)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(_enter, with_kwargs=True),
            model.register_forward_hook(_leave, with_kwargs=True, always_call=True),
        ]
        # The decoder may be called by itself; the cache then is in its own model, but nothing is restored.
        decoder = getattr(model, "base_model", model)
        if decoder is not model:
            self._handles += [
                decoder.register_forward_pre_hook(_enter_decoder, with_kwargs=True),
                decoder.register_forward_hook(_leave_decoder, with_kwargs=True, always_call=True),
            ]
        if family_of(model) is not None:
            self._handles.append(ImageDeferral(model, _is_for_us))

    @classmethod
    def attach(cls, model: torch.nn.Module) -> ModelHook:
        """The model's hook, with one user more."""
        with _turns:
            hook = _hooks.get(model)
            if hook is None:
                hook = _hooks[model] = cls(model)
            hook._users += 1
            return hook

    def detach(self) -> None:
        """One user less; the last one takes the hooks off the model. For finalizers, too."""
        _turns.soon(self._detach)

    def _detach(self) -> None:
        self._users -= 1
        if self._users == 0:
            for handle in self._handles:
                handle.remove()
            for model in [model for model, hook in _hooks.items() if hook is self]:
                del _hooks[model]


def _forget_copied(model: torch.nn.Module) -> None:
    """A deep copy of a model has its hooks, too, and nobody would take them off: each forward would be handled twice."""
    if _enter not in model._forward_pre_hooks.values():
        return
    for module in {model, getattr(model, "base_model", model)}:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if getattr(hook, "__module__", "") == __name__]:
                del hooks[number]


def _cake_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> RestoringCache | None:
    from cake_hf.cache.restoring import RestoringCache

    cache = find_cache((*kwargs.values(), *args), RestoringCache)
    return None if cache is None or cache.is_plain else cache


def _is_for_us(kwargs: dict[str, Any]) -> bool:
    return _cake_cache((), kwargs) is not None


def _enter(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # Whether torch.compile has traced the call: then the forward will be compiled code, and what is done here is not.
    return _entered(model, args, kwargs, traced=torch.compiler.is_dynamo_compiling())


@outside_graphs
def _entered(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, traced: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = _cake_cache(args, kwargs)
    if cache is None:
        _note_bypassed(model, args, kwargs)
        return None
    rewritten = cache._enter_model(model, args, kwargs, traced=traced)
    if rewritten is not None:
        return rewritten
    renamed = renamed_for(model, kwargs, cache)
    return None if renamed is None else (args, renamed)


def _note_bypassed(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where `generate` runs a prompt without the cache that it was given, that cache's report says so."""
    from cake_hf.cache.restoring import RestoringCache

    ids = args[0] if args else kwargs.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.shape[-1] > 1:
        cache = cache_given_to_generate(model, RestoringCache)
        if cache is not None and not cache.is_plain:
            cache._note_bypassed(ids)


@outside_graphs
def _leave(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cake_cache(args, kwargs)
    if cache is not None:
        cache._leave_model(model, failed=output is None)


@outside_graphs
def _enter_decoder(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cake_cache(args, kwargs)
    if cache is not None:
        cache._enter_decoder()


@outside_graphs
def _leave_decoder(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cake_cache(args, kwargs)
    if cache is not None:
        cache._leave_decoder(failed=output is None)
