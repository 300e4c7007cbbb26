"""torch.compile around a model with a cache of ours: what is ours runs between the graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo

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
