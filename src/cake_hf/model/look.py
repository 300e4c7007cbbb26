"""One look at a model: what is asked of it several times before it runs is found out once.

For each prompt a model is asked for its modules, devices and layouts many times, in functions that know nothing of each other.
Nothing changes between these questions, up to the next forward, which may change anything. So within `one_look` the answers are
kept, by thread, and what runs the model calls `look_again`. Outside of it nothing is kept.
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
    """Keep the answers of functions that are `once_per_look`; those of an outer look count in here, too."""
    if getattr(_kept, "answers", None) is not None:
        yield
        return
    _kept.answers = {}
    try:
        yield
    finally:
        _kept.answers = None


def look_again() -> None:
    """Forget the answers: a model runs, or has been changed."""
    answers: dict[Hashable, Any] | None = getattr(_kept, "answers", None)
    if answers is not None:
        answers.clear()


def once_per_look(find: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """Have a function of a model be called once per look. Its answer is shared: nobody may change it."""

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
