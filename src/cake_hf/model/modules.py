"""A model's modules and parameters, by their dictionaries.

Each prompt looks at hundreds of modules several times. torch's own iterators take twice as long for that, and `hasattr` on a
module, where it has no such attribute, ten times.
"""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.model.look import once_per_look

Named = list[tuple[str, torch.nn.Module]]


@once_per_look
def modules_of(model: torch.nn.Module) -> Named:
    """As `model.named_modules()`: each module once."""
    found: Named = []
    _visit("", model, found, set())
    return found


@once_per_look
def modules_everywhere(model: torch.nn.Module) -> Named:
    """As `modules_of`; a module that is in several places for each of them."""
    found: Named = []
    _visit("", model, found, None)
    return found


def parameters_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """As `model.named_parameters(remove_duplicate=False)`: one that modules share comes for each of them."""
    return [
        (below(path, name), parameter)
        for path, module in modules_everywhere(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


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


def any_has(model: torch.nn.Module, name: str) -> bool:
    """Whether any of the modules has that attribute; as `has`."""
    return any(name in vars(module) or hasattr(type(module), name) for _, module in modules_of(model))


def those_with(model: torch.nn.Module, *names: str) -> Named:
    """The modules that have all of these attributes; as `has`."""
    return [
        (path, module)
        for path, module in modules_of(model)
        if all(name in vars(module) or hasattr(type(module), name) for name in names)
    ]


def below(path: str, name: str) -> str:
    """The path of what a module has."""
    return f"{path}.{name}" if path else name


def _visit(path: str, module: torch.nn.Module, found: Named, seen: set[torch.nn.Module] | None) -> None:
    # Not a function within the other one: it would be held by what it holds, and the modules by it.
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _visit(f"{path}.{name}" if path else name, child, found, seen)
