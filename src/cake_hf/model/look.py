"""One look at a model: its modules, and other properties that several functions need before it runs, are determined once.

For each prompt, independent functions determine a model's modules, devices and layouts many times. These do not change before
the next forward, which may change anything. So within `one_look` the results are kept, per thread, and code that runs the model
calls `look_again`. Outside `one_look` nothing is kept.

Modules and parameters are read from their dictionaries: torch's own iterators take twice as long, and `hasattr` on a module
without the attribute takes ten times as long.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")

_kept = threading.local()


@contextmanager
def one_look() -> Iterator[None]:
    """Keeps the results of `once_per_look` functions; results of an outer look are reused."""
    if getattr(_kept, "answers", None) is not None:
        yield
        return
    _kept.answers = {}
    try:
        yield
    finally:
        _kept.answers = None


def look_again() -> None:
    """Forgets the kept results: a model runs, or has been changed."""
    answers: dict[Hashable, Any] | None = getattr(_kept, "answers", None)
    if answers is not None:
        answers.clear()


def once_per_look(find: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """Makes a function of a model run once per look. Its result is shared: callers must not change it."""

    @functools.wraps(find)
    def found(model: Any) -> Answer:
        answers: dict[Hashable, Any] | None = getattr(_kept, "answers", None)
        if answers is None:
            return find(model)
        key = find, model
        if key not in answers:
            answers[key] = find(model)
        answer: Answer = answers[key]
        return answer

    return found


Named = list[tuple[str, torch.nn.Module]]


@once_per_look
def modules_of(model: torch.nn.Module) -> Named:
    """Returns the same as `model.named_modules()`: each module once."""
    found: Named = []
    _visit("", model, found, set())
    return found


@once_per_look
def modules_everywhere(model: torch.nn.Module) -> Named:
    """Returns the same as `modules_of`, but a module in several places once for each place."""
    found: Named = []
    _visit("", model, found, None)
    return found


def parameters_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Returns the same as `model.named_parameters(remove_duplicate=False)`: a shared parameter once for each module."""
    return [
        (below(path, name), parameter)
        for path, module in modules_everywhere(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def has(module: torch.nn.Module, name: str) -> bool:
    """Works like `hasattr`, but ignores parameters, buffers and modules."""
    return name in vars(module) or hasattr(type(module), name)


def any_has(model: torch.nn.Module, name: str) -> bool:
    """Returns whether any of the modules has that attribute, in the sense of `has`."""
    return any(name in vars(module) or hasattr(type(module), name) for _, module in modules_of(model))


def those_with(model: torch.nn.Module, *names: str) -> Named:
    """Returns the modules that have all of these attributes, in the sense of `has`."""
    return [
        (path, module)
        for path, module in modules_of(model)
        if all(name in vars(module) or hasattr(type(module), name) for name in names)
    ]


def below(path: str, name: str) -> str:
    """Returns the path of a module's attribute."""
    return f"{path}.{name}" if path else name


def _visit(path: str, module: torch.nn.Module, found: Named, seen: set[torch.nn.Module] | None) -> None:
    # Not a nested function: a recursive closure is a reference cycle, which would keep the modules alive.
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _visit(f"{path}.{name}" if path else name, child, found, seen)


@once_per_look
def computing_devices(model: torch.nn.Module) -> list[tuple[str, torch.device]]:
    """Returns the path and the computing device of each module with parameters of its own."""
    found: list[tuple[str, torch.device]] = []
    _visit_devices(model, "", None, found, math.inf)
    return found


@once_per_look
def home_device(model: torch.nn.Module) -> torch.device:
    """Returns the device that computes with a model's first parameter, which is also the best one for token ids."""
    found: list[tuple[str, torch.device]] = []
    _visit_devices(model, "", None, found, 1)
    return found[0][1]


def devices_of(model: torch.nn.Module) -> list[torch.device]:
    """Returns all devices on which a model computes, each once."""
    return list(dict.fromkeys(device for _, device in computing_devices(model)))


def where_computed(model: torch.nn.Module) -> str:
    """Describes where a model computes, for users and for cost estimates: "cuda:0", "cpu, weights offloaded", ..."""
    moved = any(getattr(hook, "offload", False) for _, _, hook in hooked_modules(model))
    return ", ".join([*map(str, devices_of(model)), *["weights offloaded"] * moved])


def _visit_devices(
    module: torch.nn.Module, path: str, outer: torch.device | None, found: list[tuple[str, torch.device]], most: float
) -> None:
    own, whole = _execution_device(module)
    for parameter in module._parameters.values():
        if parameter is not None:
            found.append((path, own or outer or parameter.device))
            break
    for name, child in module._modules.items():
        if child is not None and len(found) < most:
            _visit_devices(child, f"{path}.{name}" if path else name, own if whole else outer, found, most)


def _execution_device(module: torch.nn.Module) -> tuple[torch.device | None, bool]:
    """Returns the device on which hooks make a module compute, and whether that applies to all its submodules."""
    for hook in reversed(_hooks(module)):
        device = as_device(getattr(hook, "execution_device", None))
        if device is not None:
            return device, bool(getattr(hook, "place_submodules", True))
    return None, False


def hooked_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, Any]]:
    """Returns the hooks of accelerate, each with its module and the module's path. They place weights and inputs."""
    return [(path, module, hook) for path, module in modules_of(model) for hook in _hooks(module)]


def _hooks(module: torch.nn.Module) -> Sequence[Any]:
    hook = vars(module).get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def as_device(given: Any) -> torch.device | None:
    """Converts a hook's device, which may be a `torch.device`, a text or a number."""
    return None if given is None else torch.device(given)
