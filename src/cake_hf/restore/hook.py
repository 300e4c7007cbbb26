"""The one hook on a model: it sees each forward, and hands those that bring a `CakeCache` to that cache.

The hook stays as long as a session of the model is open. It holds no cache, and a forward with any other cache, or none, passes
unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from cake_hf.layers.compat import renamed_for
from cake_hf.model.caller import cache_given_to_generate
from cake_hf.model.foreign_code import is_aside, is_compiled, outside_graphs
from cake_hf.model.images import ImageDeferral
from cake_hf.model.vision import family_of
from cake_hf.util.forks import FinalizerLock

Rewritten = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, positional and by keyword, that a forward gets instead of its own."""


class HookedCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed for us
    """A cache that is called before and after each forward of its model; `RestoringCache` is the only subclass in use.

    The attributes are plain ones, since torch.compile traces the code that reads them.

    Attributes:
        passive: the cache is no more than its base class, `DynamicCache`.
        in_front: compiled code is running, called by `hook.InFront`.
    """

    passive = False
    in_front = False

    @property
    def _busy(self) -> bool:
        """Whether a restore is running: its forwards pass the hook unchanged."""
        return False

    def is_over(self) -> bool:
        """Returns whether the hooks have nothing more to do for this cache."""
        return False

    def is_inside(self) -> bool:
        """Returns whether a forward of the cache's model is running."""
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
        """Handles the start of a forward; returns None to leave it unchanged.

        Args:
            model: whose forward it is.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            traced: torch.compile traces the call.
            compiled: compiled code will run it.
        """
        raise NotImplementedError

    def _leave_model(self, model: torch.nn.Module, *, failed: bool) -> None:
        """Handles the end of a forward."""
        raise NotImplementedError

    def _enter_decoder(self) -> None:
        """Handles the start of a forward of the model's decoder, possibly within the model's own forward."""
        raise NotImplementedError

    def _leave_decoder(self, *, failed: bool) -> None:
        """Handles the end of a forward of the model's decoder."""
        raise NotImplementedError

    def _note_bypassed(self, ids: torch.Tensor) -> None:
        """Notes that the model is called with these tokens and without this cache, although `generate` was given it."""
        raise NotImplementedError


_hooks: weakref.WeakKeyDictionary[torch.nn.Module, ModelHook] = weakref.WeakKeyDictionary()
_turns = FinalizerLock()


class ModelHook:
    """Forward hooks on a model and on its decoder. Its users are counted: the last `detach` removes the hooks."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._users = 0
        _forget_copied(model)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(_enter, with_kwargs=True),
            model.register_forward_hook(_leave, with_kwargs=True, always_call=True),
        ]
        # The decoder may be called directly; the cache is then used by its own model, but nothing is restored.
        decoder = getattr(model, "base_model", model)
        if decoder is not model:
            self._handles += [
                decoder.register_forward_pre_hook(_enter_decoder, with_kwargs=True),
                decoder.register_forward_hook(_leave_decoder, with_kwargs=True, always_call=True),
            ]
        if family_of(model) is not None:
            self._handles.append(ImageDeferral(model, _is_for_us))
        self._model = weakref.ref(model)
        self._wrapped: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    @classmethod
    def attach(cls, model: torch.nn.Module) -> ModelHook:
        """Returns the model's hook, with one more user."""
        with _turns:
            hook = _hooks.get(model)
            if hook is None:
                hook = _hooks[model] = cls(model)
            hook._users += 1
            return hook

    def stay_in_front(self, given: Any = None) -> None:
        """Makes the hook run before compiled code does, even if that is compiled as one graph.

        Args:
            given: what the user passed as the model: it may be the module that torch.compile has put around it.
        """
        model: Any = self._model()
        if model is None:
            return
        compiled = model._compiled_call_impl
        if compiled is not None and not isinstance(compiled, InFront):
            model._compiled_call_impl = InFront(model, compiled)
        is_around = getattr(given, "_orig_mod", None) is model
        if is_around:
            if not isinstance(given.forward, InFront):
                given.forward = InFront(model, given.forward)
            self._wrapped.add(given)

    def detach(self) -> None:
        """Removes one user; the last one takes the hooks off the model. Safe to call from finalizers."""
        _turns.soon(self._detach)

    def _detach(self) -> None:
        self._users -= 1
        if self._users == 0 and not self._is_traced():
            for handle in self._handles:
                handle.remove()
            for model in [model for model, hook in _hooks.items() if hook is self]:
                del _hooks[model]

    def _is_traced(self) -> bool:
        """Returns whether the hooks are part of graphs, which would be compiled again without them and with the next ones.

        Such hooks may stay, since they do nothing without a cache of ours.
        """
        model = self._model()
        return model is not None and family_of(model) is None and (bool(self._wrapped) or is_compiled(model))


def _forget_copied(model: torch.nn.Module) -> None:
    """Removes the hooks that a deep copy of a model inherits: nothing else would, and each forward would be handled twice."""
    if _enter not in model._forward_pre_hooks.values():
        return
    for module in {model, getattr(model, "base_model", model)}:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if getattr(hook, "__module__", "") == __name__]:
                del hooks[number]


def _cake_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookedCache | None:
    """Returns the cache of ours in a call, if it has work to do. Written in simple terms that torch.compile can trace."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, HookedCache):
            return None if value.passive or value.is_over() else value
    return None


def _is_for_us(kwargs: dict[str, Any]) -> bool:
    return _cake_cache((), kwargs) is not None


class InFront:
    """Wraps compiled code that runs a model with its hooks: what has to run outside of its graphs runs before and after it.

    Attributes:
        compiled: the code.
    """

    def __init__(self, model: torch.nn.Module, compiled: Callable[..., Any]) -> None:
        self._model = model
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # as part of a larger graph
            return self.compiled(*args, **kwargs)
        cache = _cake_cache(args, kwargs)
        if cache is None or cache._busy or cache.in_front:
            if cache is None:
                _note_bypassed(self._model, args, kwargs)
            return self.compiled(*args, **kwargs)
        args, kwargs = _handed_on(cache, self._model, args, kwargs, compiled=True) or (args, kwargs)
        cache.in_front = True
        ended = False
        try:
            output = self.compiled(*args, **kwargs)
            ended = True
        finally:
            cache.in_front = False
            cache._leave_model(self._model, failed=not ended)
        return output


def _enter(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rewritten | None:
    if not torch.compiler.is_dynamo_compiling():
        return _entered(model, args, kwargs, traced=False)
    # torch.compile traces the call: the forward will be compiled code, but the work done here must stay out of the graph.
    cache = _cake_cache(args, kwargs)
    if cache is None or cache.in_front:
        return None
    torch._dynamo.graph_break(
        msg="cake_hf restores prompts outside of graphs: make the CakeCache after model.compile(fullgraph=True), or with what "
        "torch.compile(model, fullgraph=True) returned"
    )
    return _entered_outside(model, args, kwargs, traced=True)


def _entered(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, traced: bool
) -> Rewritten | None:
    cache = _cake_cache(args, kwargs)
    if cache is None:
        _note_bypassed(model, args, kwargs)
        return None
    if cache.in_front and not cache._busy:
        return None
    return _handed_on(cache, model, args, kwargs, traced=traced)


_entered_outside = outside_graphs(_entered)


def _handed_on(
    cache: HookedCache, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **how: bool
) -> Rewritten | None:
    rewritten = cache._enter_model(model, args, kwargs, **how)
    if rewritten is not None:
        return rewritten
    renamed = renamed_for(model, kwargs, cache)
    return None if renamed is None else (args, renamed)


def _note_bypassed(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tells the cache that was given to `generate` if a prompt runs without it, so that its report says so."""
    ids = args[0] if args else kwargs.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.shape[-1] > 1 and not is_aside():
        cache = cache_given_to_generate(model, HookedCache)
        if cache is not None and not cache.passive and not cache.is_over():
            cache._note_bypassed(ids)


def _leave(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        cache = _cake_cache(args, kwargs)
        if cache is not None and not cache.in_front:
            _left_outside(model, args, kwargs, output)
    else:
        _left(model, args, kwargs, output)


def _left(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cake_cache(args, kwargs)
    if cache is not None and (not cache.in_front or cache._busy):
        cache._leave_model(model, failed=output is None)


_left_outside = outside_graphs(_left)


def _enter_decoder(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _entered_decoder(args, kwargs)
    elif not _needs_nothing(args, kwargs):
        _entered_decoder_outside(args, kwargs)


def _needs_nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a traced decoder call needs no work: it has no cache of ours, or comes from within its model."""
    cache = _cake_cache(args, kwargs)
    return cache is None or cache.is_inside()


def _entered_decoder(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cake_cache(args, kwargs)
    if cache is not None:
        cache._enter_decoder()


_entered_decoder_outside = outside_graphs(_entered_decoder)


def _leave_decoder(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _left_decoder(args, kwargs, failed=output is None)
    elif not _needs_nothing(args, kwargs):
        _left_decoder_outside(args, kwargs, failed=output is None)


def _left_decoder(args: tuple[Any, ...], kwargs: dict[str, Any], *, failed: bool) -> None:
    cache = _cake_cache(args, kwargs)
    if cache is not None:
        cache._leave_decoder(failed=failed)


_left_decoder_outside = outside_graphs(_left_decoder)
