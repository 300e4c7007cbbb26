"""Errors of the user's that come out of any code that the main thread runs: what a signal handler raises.

A watchdog (an alarm whose handler raises) interrupts whatever is going on, and its error looks as if that had failed. So
who takes an error for a fault of a model's or a store's, and goes on, asks `is_the_users` first.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from itertools import chain, pairwise
from types import FrameType, TracebackType


def is_the_users(error: BaseException) -> bool:
    """Whether an error is no fault of what was going on: an interrupt, or raised by a signal handler, whoever wrote that.

    Errors that were raised while the handler's was dealt with count, too. Signals come in the main thread alone; in all others
    nobody but what was called can have raised anything.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    return not isinstance(error, Exception) or any(map(_came_from_a_handler, _chain(error)))


class faults_suppressed:  # noqa: N801  # as `contextlib.suppress`
    """As `contextlib.suppress`, but for what is the user's."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return isinstance(error, self._kinds) and not is_the_users(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from, or while they were dealt with; not one that was so before all that began."""
    one: BaseException | None = error
    frames: set[FrameType] = set()
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        yield one
        seen.add(id(one))
        frames.update(frame for frame, _ in traceback.walk_tb(one.__traceback__))
        before = one.__cause__ or one.__context__
        inside = before is not None and before.__traceback__ is not None and before.__traceback__.tb_frame in frames
        one = before if inside else None


def _came_from_a_handler(error: BaseException) -> bool:
    """Python calls a handler with the frame that it interrupts, so that this is an argument of the frame behind it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(any(value is before for value in _arguments(frame)) for before, frame in pairwise(frames))


def _arguments(frame: FrameType) -> Iterator[object]:
    code, values = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & _VARARGS)
    named = [values.get(name) for name in code.co_varnames[:count]]
    several = named[-1] if code.co_flags & _VARARGS else None
    return chain(named, several if isinstance(several, tuple) else ())


_VARARGS = 0x04
