"""Support for torch.compile around a model with one of our caches: the package's own code runs between the graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo

from cake_hf.model.modules import attributes_of
from cake_hf.util.forks import Lock

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Wraps a function so that it runs untraced when code that torch.compile traces calls it.

    A restore waits for threads, which no graph can express. Without torch.compile the wrapper costs a tenth of a microsecond.
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
