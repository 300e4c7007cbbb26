"""One look at a model: properties that several functions need before it runs are determined only once.

For each prompt, independent functions determine a model's modules, devices and layouts many times. These do not change before
the next forward, which may change anything. So within `one_look` the results are kept, per thread, and code that runs the model
calls `look_again`. Outside `one_look` nothing is kept.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

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
