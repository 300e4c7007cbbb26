"""Questions to a store: calls that may hang or raise anything, bounded in time, whose errors are answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from cake_hf.errors import DeadlineExceeded
from cake_hf.util.threads import refusal

T = TypeVar("T")


class Late:
    """Calls of one kind that were given up. As long as one of them hangs another one would, too, and cost one thread more.

    Finalizers ask, too, which may run at any moment in any thread: so there is no lock, and each step is one of the set.
    """

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    def __bool__(self) -> bool:
        self._threads.difference_update([thread for thread in self._threads.copy() if not thread.is_alive()])
        return bool(self._threads)

    def add(self, thread: threading.Thread) -> None:
        """A call was given up that this thread is at."""
        self._threads.add(thread)


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What came of a call.

    Attributes:
        value: that it returned; None where it failed.
        error: that it raised, or that there was no answer; None where all went well.
    """

    value: T | None = None
    error: BaseException | None = None

    @property
    def trouble(self) -> str:
        """The error as a sentence; empty where there was none."""
        return "" if self.error is None else in_words(self.error)

    def get(self) -> T:
        """The value; raises the error where there is one."""
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


class Call(Generic[T]):
    """A call in a thread of its own. Nothing that it raises goes further, whatever it is derived from.

    A call that hangs cannot be ended from outside; its (daemon) thread is left to it.

    Args:
        call: to run.
        what: it is about, in a word.
    """

    def __init__(self, call: Callable[[], T], what: str) -> None:
        self._call: Callable[[], T] | None = call
        self._answer: Answer[T] | None = None
        self._what = what
        self.thread = threading.Thread(target=self._run, name=f"cake-{what}", daemon=True)

    def begin(self) -> None:
        """Start the thread, unless that was done; where the system gives none, that is the answer."""
        if self.thread.ident is not None:
            return
        error = refusal(self.thread)
        if error is not None:
            self._answer = Answer(error=error)

    def wait(self, seconds: float) -> Answer[T]:
        """The answer; `DeadlineExceeded` where there is none within that time.

        What is raised in here comes from a signal handler of the user's, never from the call.
        """
        if self._answer is None:
            self.thread.join(seconds)
        if self._answer is not None:
            return self._answer
        return Answer(error=DeadlineExceeded(f"The store did not answer ({self._what}) within {seconds:g} s."))

    def _run(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        try:
            answer = Answer(call())
        except BaseException as error:
            answer = Answer(error=error)
        self._answer = answer


class Question(Generic[T]):
    """A call that has begun, in a thread of its own, and whose answer is wanted later.

    Args:
        call: to run.
        what: it is about, in a word.
        late: calls that were given up earlier: while there are any, this one is not begun.
    """

    def __init__(self, call: Callable[[], T], what: str, late: Late | None = None) -> None:
        self._call: Call[T] | None = None
        self._late = late
        self._what = what
        if not late:
            self._call = Call(call, what)
            self._call.begin()

    def answer(self, seconds: float) -> Answer[T]:
        """What came of it within that time; then it is given up. Nothing is raised but by the user's signal handlers."""
        if self._call is None:
            return Answer(
                error=DeadlineExceeded(
                    f"An earlier question ({self._what}) is still not answered; nothing is asked until it is."
                )
            )
        try:
            return self._call.wait(seconds)
        finally:
            self.give_up()

    def give_up(self) -> None:
        """The answer is not wanted any more."""
        if self._call is not None and self._late is not None and self._call.thread.is_alive():
            self._late.add(self._call.thread)


def ask(call: Callable[[], T], seconds: float, what: str, late: Late | None = None) -> Answer[T]:
    """Run a call in a thread of its own and wait for it, but not for ever. Nothing is raised but by the user's signal handlers.

    Args:
        call: to run.
        seconds: to wait.
        what: it is about, in a word.
        late: calls that were given up earlier: while there are any, this one is not begun.
    """
    return Question(call, what, late).answer(seconds)


def call_with_deadline(call: Callable[[], T], seconds: float, what: str, late: Late | None = None) -> T:
    """As `ask`, for who wants the value, or the error raised.

    Raises:
        DeadlineExceeded: no answer in time.
        BaseException: whatever the call raised.
    """
    return ask(call, seconds, what, late).get()


def in_words(error: BaseException) -> str:
    """What an error says, for the middle of a sentence; one that says nothing, or is no usual error, with its type."""
    text = str(error)
    return text if text and isinstance(error, Exception) else f"{type(error).__name__}: {text}".removesuffix(": ")
