"""The code that a model computes with: functions that replace its own, and plain attributes of its modules.

A config describes how a model was built. Afterwards a user may replace a method of a class, a function in the class's file, the
forward of one module, or a number that a module keeps (`attention.scaling`). None of these is a weight. Changes that are not
detected here are detected by running the model (`model.behaviour`).
"""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any

import torch
import xxhash

from cake_hf.chunks.aligned_memory import host_bytes
from cake_hf.model.look import Named, modules_everywhere, modules_of

_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))

MAX_DEPTH = 4
"""Maximum depth to which nested values are inspected."""

TORCHS_OWN = frozenset(vars(torch.nn.Module()))
"""Attributes that every module has."""


def code_digest(model: torch.nn.Module, chosen: Mapping[str, Any]) -> str:
    """Returns a digest of a model's plain attributes and of its functions, as far as these can be identified by name.

    It is equal in two processes with equal libraries, unless something was replaced.

    Args:
        model: any model.
        chosen: functions that its config selects by name, such as the kind of attention.
    """
    digest = xxhash.xxh3_128()
    for fact in _digest_parts(model, chosen):
        digest.update(f"{fact};".encode(errors="replace"))
    return str(digest.hexdigest())


def users_functions(model: torch.nn.Module, chosen: Mapping[str, Any]) -> list[str]:
    """Returns those functions of `code_digest` that no installed library provides: none, unless a user has added some.

    Unlike the digest, the result does not depend on the versions of libraries.
    """
    kinds = {type(module) for _, module in modules_of(model)}
    own = {_package(kind.__module__) for kind in kinds}
    members = [value for kind in kinds for parent in _computing(kind) for value in list(vars(parent).values())]
    members += [
        value for name in {kind.__module__ for kind in kinds} for value in vars(sys.modules.get(name, sys)).values()
    ]
    members += [vars(module)["forward"] for _, module in modules_of(model) if "forward" in vars(module)]
    members += [*vars(torch.nn.functional).values(), *chosen.values()]
    functions = (getattr(value, "__func__", getattr(value, "fget", value)) for value in members)
    return sorted({function_fact(function) for function in functions if _is_the_users(function, own)})


def _is_the_users(function: Any, own: set[str]) -> bool:
    """Returns whether a function comes neither from an installed library nor from a package of the model's modules."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if not isinstance(code, CodeType):
        return False
    return is_users_code(str(getattr(function, "__globals__", {}).get("__name__", "")), code.co_filename, own)


def is_users_code(module: str, file: str, own: Collection[str]) -> bool:
    """Returns whether code of that module and file comes neither from an installed library nor from one of these packages."""
    return _package(module) not in own and not file.startswith((*_INSTALLED, "<frozen "))


def _digest_parts(model: torch.nn.Module, chosen: Mapping[str, Any]) -> Iterator[str]:
    modules = _by_shortest_path(model)
    kinds = sorted({type(module) for _, module in modules}, key=_name)
    for kind in kinds:
        if not kind.__module__.startswith("torch."):
            yield from _methods(kind)
    for name in sorted({kind.__module__ for kind in kinds if not kind.__module__.startswith("torch.")}):
        yield from _functions(sys.modules.get(name))
    yield from _functions(torch.nn.functional)
    yield from (f"{name}={function_fact(function)}" for name, function in sorted(chosen.items()))
    for path, module in modules:
        yield path
        yield from _attributes(module)


def _by_shortest_path(model: torch.nn.Module) -> Named:
    """Returns each module once, with its shortest path.

    Some tools attach an existing module a second time below others, where it is found first.
    """
    paths: dict[torch.nn.Module, str] = {}
    for path, module in modules_everywhere(model):
        if module not in paths or path.count(".") < paths[module].count("."):
            paths[module] = path
    return sorted(((path, module) for module, path in paths.items()), key=lambda named: named[0])


def _methods(kind: type) -> Iterator[str]:
    """Yields the methods of a class and its bases that were not written in the class that holds them."""
    for parent in _computing(kind):
        for name, value in list(vars(parent).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if not callable(function) or isinstance(function, type):
                continue
            if not hasattr(function, "__code__") or _is_strange(function, parent, name):
                yield f"{_name(parent)}.{name}={function_fact(function)}"


def _computing(kind: type) -> list[type]:
    """Returns a module's class and its base classes, without torch's own and without those that only serve generation."""
    return [
        parent
        for parent in kind.__mro__
        if issubclass(parent, torch.nn.Module) and not parent.__module__.startswith("torch.")
    ]


def code_of(model: torch.nn.Module) -> list[Mapping[str, Any]]:
    """Returns what the classes of a model's modules, and the files of these classes, hold by name."""
    kinds = {parent for _, module in modules_of(model) for parent in _computing(type(module))}
    files = {kind.__module__ for kind in kinds if kind.__module__ in sys.modules}
    return [*map(vars, kinds), *(vars(sys.modules[name]) for name in files)]


def _is_strange(function: Any, kind: type, name: str) -> bool:
    """Returns whether a function was not written in that class. A wrapper made with `functools.wraps` claims that it was."""
    says_otherwise = (function.__module__, function.__qualname__) != (kind.__module__, f"{kind.__qualname__}.{name}")
    return says_otherwise or _package(function.__globals__.get("__name__", "")) != _package(kind.__module__)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _functions(module: ModuleType | None) -> Iterator[str]:
    """Yields the names of a file's functions and classes, and their origins."""
    for name, value in list(vars(module).items()) if module is not None else ():
        if callable(value) and not name.startswith("__"):
            yield f"{name}={function_fact(value, by_name=_is_from_library(value))}"


def _is_from_library(value: Any) -> bool:
    """Returns whether a function or class is the one that its name refers to, so that name and library version identify it."""
    if isinstance(value, type) or not hasattr(value, "__code__"):
        return isinstance(value, type) or type(value).__module__ == "builtins"
    home = sys.modules.get(value.__module__ or "")
    return value.__globals__ is getattr(home, "__dict__", None)


def _attributes(module: torch.nn.Module) -> Iterator[str]:
    # The model itself also keeps names, notes and the path that it was loaded from; of its attributes only numbers count.
    is_model = hasattr(type(module), "from_pretrained")
    for name, value in vars(module).items():
        if name == "_compiled_call_impl":  # chunks run without it, with the forward that was compiled
            continue
        if name in ("forward", "_old_forward"):  # accelerate keeps the forward that it calls in the latter
            value = getattr(value, "_torchdynamo_orig_callable", value)
            if not _brings_weights(value) and getattr(value, "__func__", None) is not type(module).forward:
                yield f"forward={function_fact(value)}"
            continue
        if name in TORCHS_OWN or name.startswith("_is_hf") or (is_model and type(value) not in (int, float)):
            continue
        if value is not None and (fact := _plain(value, MAX_DEPTH)) is not None:
            yield f"{name}={fact}"


def _brings_weights(forward: Any) -> bool:
    """Returns whether a module's forward is accelerate's wrapper, which brings weights and inputs to the device."""
    function = forward.func if isinstance(forward, functools.partial) else forward
    return str(getattr(function, "__module__", "")).startswith("accelerate.")


def _plain(value: Any, depth: int) -> str | None:
    """Returns a value as text that is the same in every process; None if the value is not plain."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.Size)):
        return repr(value)
    if isinstance(value, (list, tuple)) and depth:
        return repr([_plain(item, depth - 1) for item in value])
    if isinstance(value, (set, frozenset)) and depth:
        return repr(sorted(str(_plain(item, depth - 1)) for item in value))
    if isinstance(value, dict) and depth:
        return repr([(_plain(name, 1), _plain(item, depth - 1)) for name, item in value.items()])
    if callable(value) and not isinstance(value, torch.nn.Module):
        return function_fact(value)
    return None


def function_fact(function: Any, depth: int = MAX_DEPTH, *, by_name: bool = False) -> str:
    """Returns a function as text: its name and, if it is written in Python, its code and the values that it holds.

    Args:
        function: a function, a class, or any other callable.
        depth: how deep to look into the values that it holds.
        by_name: the name alone identifies it.
    """
    name = _name(function)
    if by_name or not depth:
        return name
    if isinstance(function, functools.partial):
        held: list[Any] = [function.func, *function.args, *function.keywords.items()]
    else:
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if not isinstance(code, CodeType):
            return name
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items(), *_cells(function)]
        name += f" {_code(code)}"
    return f"{name} {[_held(value, depth - 1) for value in held]}" if held else name


def _held(value: Any, depth: int) -> str:
    """Returns a value that a function holds as text; if it is not plain, its type."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype} {_content(value)}"
    if callable(value) and not isinstance(value, (type, torch.nn.Module)):
        return function_fact(value, depth, by_name=_is_from_library(value))
    return _plain(value, depth) or _name(type(value))


def _content(tensor: torch.Tensor) -> str:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
        return ""
    return xxhash.xxh3_128_hexdigest(host_bytes(tensor))


def _cells(function: Any) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # it is empty
            cells.append(None)
    return cells


@functools.lru_cache(maxsize=4096)
def _code(code: CodeType) -> str:
    constants = [
        _code(constant) if isinstance(constant, CodeType) else _plain(constant, MAX_DEPTH)
        for constant in code.co_consts
    ]
    text = f"{constants} {code.co_names}".encode(errors="replace")
    return hashlib.blake2b(code.co_code + text, digest_size=16).hexdigest()


def _name(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        return "functools.partial"
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(owner, '__module__', '')}.{owner.__qualname__}"
