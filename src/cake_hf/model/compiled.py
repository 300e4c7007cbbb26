"""torch.compile around a model with a cache of ours: what is ours runs between the graphs."""

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
    """Have a function run as it is where it is called by code that torch.compile traces.

    A restore waits for threads, and no graph can hold that. Without torch.compile it costs a tenth of a microsecond.
    """
    apart = _disable_dynamo(function)  # as torch.compiler.disable, which imports the compiler at once

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return apart(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else function(*args, **kwargs)

    return called  # type: ignore[return-value]  # with the same signature


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether a model, or a module in it, runs compiled code: `compile()`, or torch.compile around it or its forward."""
    for attributes in attributes_of(model):
        if attributes.get("_compiled_call_impl") is not None or "_orig_mod" in attributes["_modules"]:
            return True
        if "forward" in attributes and hasattr(attributes["forward"], "_torchdynamo_orig_callable"):
            return True
    return False


_lock = Lock()
_running: list[Any] = []
"""Of threads that run compiled models as they are; the first one has put what is in force, since that is so for all threads."""


@contextmanager
def as_it_is(model: torch.nn.Module) -> Iterator[None]:
    """Run a model without its compiled code, which rounds otherwise in each graph, so that nothing of it can be stored."""
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
            # The last thread takes back the stance that the first one set.
            _running.pop()
