"""Detection of the user's own errors: a signal handler can raise one from any code that the main thread runs.

A watchdog (an alarm whose handler raises) interrupts the running code, and its error looks as if that code had failed. So code
that treats an error as a fault of a model or a store, and continues, calls `is_the_users` first.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from itertools import chain, pairwise
from types import FrameType, TracebackType


def is_the_users(error: BaseException) -> bool:
    """Returns whether an error is not a fault of the running code: an interrupt, or raised by any signal handler.

    Errors raised while the handler's error was being handled count as well. Signals are handled in the main thread only; in any
    other thread an error can only come from the code that was called.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    return not isinstance(error, Exception) or any(map(_came_from_a_handler, _chain(error)))


class faults_suppressed:  # noqa: N801  # as `contextlib.suppress`
    """Works like `contextlib.suppress`, but lets the user's own errors through."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return isinstance(error, self._kinds) and not is_the_users(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and its causes and contexts; stops at one that was being handled before all this began."""
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
    """Returns whether a signal handler raised an error.

    Python calls a handler with the frame that it interrupts, so this frame is an argument of the next one in the traceback.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(any(value is before for value in _arguments(frame)) for before, frame in pairwise(frames))


def _arguments(frame: FrameType) -> Iterator[object]:
    code, values = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & _VARARGS)
    named = [values.get(name) for name in code.co_varnames[:count]]
    several = named[-1] if code.co_flags & _VARARGS else None
    return chain(named, several if isinstance(several, tuple) else ())


_VARARGS = 0x04
