"""Code around a model's forward that is not the model's: foreign hooks and modes, torch.compile, and presses of kvpress.

A forward hook may do anything to the data that passes through it, and this shows only in its effect on the prompt at hand. It
would also see only the computed parts of a restored prompt. So a model with hooks is computed plainly, unless these are marked
with `reads_only`.

The package's own code runs between the graphs of torch.compile, since a restore waits for threads, which no graph can express.

A press of kvpress shortens a cache's content after a prompt, by hooks on the attention modules, and expects the whole prompt
in one forward. So a cache's presses are disabled during a restore, and the model's own KV is saved. After the suffix, each
press is applied to the whole content of its layer, as to a computed prompt. This works for presses that use only K and V; with
others, prompts are computed plainly. Nothing here imports kvpress: a press is recognised by its hook, which is one of its
methods.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.nn.modules import module as torchs_modules
from transformers import Cache

from cake_hf.layers import TokenMajorLayer
from cake_hf.layers.compat import find_cache
from cake_hf.model.look import Named, modules_of
from cake_hf.report import Refusal
from cake_hf.util.forks import Lock

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "cake_hf")
"""Libraries that run a model, even from a checkout. Their hooks place weights and inputs, agree with other ranks, or are
checked elsewhere (`fingerprint.adapters_vary`)."""
_OTHERWISE = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)
"""Modules of torch that compute differently in training mode."""

_side_run = threading.local()


class ReadsOnly:
    """A forward hook that returns nothing, and is not called in the package's own forwards that belong to no prompt."""

    def __init__(self, hook: Callable[..., object]) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not is_aside():
            self.hook(*args, **kwargs)


def reads_only(hook: Callable[..., object]) -> ReadsOnly:
    """Marks a forward hook, or pre-hook, that may stay on a model whose prompts are restored.

        model.model.layers[0].register_forward_hook(cake_hf.reads_only(hook))

    The hook is called for the computed parts of a prompt, one after the other, and for decoded tokens; not for loaded parts.
    Its return value is ignored. It must not change its arguments in place.

    Args:
        hook: as torch takes it.

    Returns:
        The hook to register instead.
    """
    return ReadsOnly(hook)


def is_aside() -> bool:
    """Returns whether this thread is running a model on tokens that belong to no prompt; see `aside`."""
    return getattr(_side_run, "on", False)


def foreign_code_refusal(model: torch.nn.Module) -> Refusal | None:
    """Returns why foreign code in the forward requires computing prompts plainly; None if there is no such code."""
    modules = modules_of(model)
    return _hook_refusal(modules) or mode_refusal() or _training_refusal(model, modules)


def _hook_refusal(modules: Named) -> Refusal | None:
    advice = "remove it, or mark it with cake_hf.reads_only if it changes nothing and need not see what is loaded"
    everywhere = (torchs_modules._global_forward_pre_hooks, torchs_modules._global_forward_hooks)
    for hook in (hook for hooks in everywhere for hook in hooks.values()):
        if not _is_known(hook, None):
            return Refusal(
                "foreign-hook", f"a forward hook on all modules ({_name(hook)}) might change the KV; {advice}"
            )
    for path, module in modules:
        if module._forward_pre_hooks or module._forward_hooks:
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                if not _is_known(hook, module):
                    return Refusal(
                        "foreign-hook",
                        f"a forward hook on {path or 'the model'} ({_name(hook)}) might change the KV; {advice}",
                    )
    return None


def mode_refusal() -> Refusal | None:
    """Returns why a mode of torch that is active requires computing prompts plainly; None if there is none."""
    for kind, count, get in (
        ("function", torch._C._len_torch_function_stack, torch._C._get_function_stack_at),
        ("dispatch", torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at),
    ):
        for number in range(count()):
            mode = get(number)
            if type(mode).__module__ != "torch.utils._device":  # `with torch.device(...)` only affects new tensors
                name = type(mode).__qualname__
                return Refusal(
                    "torch-mode", f"a torch {kind} mode ({name}) is active, which might change the KV; leave it first"
                )
    return None


def _training_refusal(model: torch.nn.Module, modules: Named) -> Refusal | None:
    """Returns the refusal if a part is in training mode. A whole model in that mode is refused elsewhere."""
    if model.training:
        return None
    for path, module in modules:
        if module.training and _minds_training(module, model):
            return Refusal(
                "part-in-training", f"{path} is in training mode, although the model is not; call model.eval()"
            )
    return None


def _minds_training(module: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Returns whether training mode may change a module's results: dropout, and the model's own classes, which may use it."""
    if isinstance(module, _OTHERWISE):
        return getattr(module, "p", 1) > 0
    return type(module).__module__.partition(".")[0] == type(model).__module__.partition(".")[0]


def _is_known(hook: Any, module: torch.nn.Module | None) -> bool:
    if isinstance(hook, ReadsOnly):
        return True
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    if owner is not None and owner is module:  # a module's own hook: its class is part of the fingerprint
        return True
    written = getattr(getattr(hook, "__func__", hook), "__globals__", {}).get("__name__") or type(hook).__module__
    return str(written).partition(".")[0] in LIBRARIES


def _name(hook: Any) -> str:
    named = hook.func if isinstance(hook, functools.partial) else hook
    return str(getattr(named, "__qualname__", type(named).__qualname__))


F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Wraps a function so that it runs untraced when code that torch.compile traces calls it.

    Without torch.compile the wrapper costs a tenth of a microsecond.
    """
    apart = _disable_dynamo(function)  # like torch.compiler.disable, which however imports the compiler at once

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return apart(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else function(*args, **kwargs)

    return called  # type: ignore[return-value]  # with the same signature


def is_compiled(model: torch.nn.Module) -> bool:
    """Returns whether a model, or a module in it, is compiled: by `compile()`, or torch.compile around it or its forward."""
    for attributes in attributes_of(model):
        if attributes.get("_compiled_call_impl") is not None or "_orig_mod" in attributes["_modules"]:
            return True
        if "forward" in attributes and hasattr(attributes["forward"], "_torchdynamo_orig_callable"):
            return True
    return False


def attributes_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Returns the attributes of each module, without paths and in no particular order; those of shared modules may occur twice.

    It is for checks made with each chunk and each decoded token: it takes half the time of `modules_of`.
    """
    found: list[dict[str, Any]] = []
    left: list[torch.nn.Module | None] = [model]
    opened: set[torch.nn.Module] = set()
    while left:
        module = left.pop()
        if module is None:
            continue
        attributes = vars(module)
        found.append(attributes)
        if (children := attributes["_modules"]) and module not in opened:
            opened.add(module)
            left += children.values()
    return found


_lock = Lock()
_running: list[Any] = []
"""One entry per thread that runs a compiled model uncompiled; the first holds the stance, which applies to all threads."""


@contextmanager
def as_it_is(model: torch.nn.Module) -> Iterator[None]:
    """Runs a model without its compiled code, whose results cannot be stored, since each graph rounds differently."""
    if not is_compiled(model):
        yield
        return
    with _lock:
        _running.append(None if _running else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            if len(_running) == 1:
                _running[0].__exit__(None, None, None)
            # The last thread to leave resets the stance that the first one set.
            _running.pop()


@contextmanager
def aside(model: torch.nn.Module) -> Iterator[None]:
    """Prepares this thread for forwards that belong to no prompt: uncompiled, and not seen by hooks marked with `reads_only`.

    Each press on the model is put behind its gate, so that it can be off in these forwards.
    """
    Presses.on(model)
    before, _side_run.on = is_aside(), True
    try:
        with as_it_is(model):
            yield
    finally:
        _side_run.on = before


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
        """Applies the presses to layers that hold a whole prompt."""
        for pressed in self.pressed:
            module, layer = pressed.module, layers[pressed.module.layer_idx]
            layer.keys, layer.values = pressed.press.compress(module, None, layer.keys, layer.values, None, {})


def _is_press(owner: Any) -> bool:
    """Returns whether a hook's owner is a press, which may be a user's own."""
    return any(base.__module__.split(".")[0] == "kvpress" for base in type(owner).__mro__)


def _is_served(press: Any) -> bool:
    return type(press).__name__ in SERVED and type(press).__module__.split(".")[0] == "kvpress"
