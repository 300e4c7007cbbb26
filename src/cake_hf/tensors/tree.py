"""A model's modules and parameters, by their dictionaries.

Each prompt looks at hundreds of modules several times. torch's own iterators take twice as long for that, and `hasattr` on a
module, where it has no such attribute, ten times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Named = list[tuple[str, torch.nn.Module]]


def modules_of(model: torch.nn.Module, *, once: bool = True) -> Named:
    """As `model.named_modules()`: each module once; or, if it is in several places, for each of them."""
    return _walked(model, once=once)


def parameters_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """As `model.named_parameters(remove_duplicate=False)`: one that modules share comes for each of them."""
    for path, module in _walked(model, once=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield below(path, name), parameter


def attributes_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The attributes of each module, without its path and in no order; those of shared modules may be in it twice.

    For what is asked with each chunk and each decoded token: it takes half the time of `modules_of`.
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


def has(module: torch.nn.Module, name: str) -> bool:
    """As `hasattr`, except that it does not see parameters, buffers and modules."""
    return name in vars(module) or hasattr(type(module), name)


def below(path: str, name: str) -> str:
    """The path of what a module has."""
    return f"{path}.{name}" if path else name


def _walked(model: torch.nn.Module, *, once: bool) -> Named:
    found: Named = []
    _visit("", model, found, set() if once else None)
    return found


def _visit(path: str, module: torch.nn.Module, found: Named, seen: set[torch.nn.Module] | None) -> None:
    # Not a function within the other one: it would be held by what it holds, and the modules by it.
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _visit(below(path, name), child, found, seen)
