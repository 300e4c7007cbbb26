"""Questions to a store: calls that may hang or raise anything. They are bounded in time, and their errors are answers.

Each question, and each read, has a limit of its own. A store that hangs in all of them would cost a prompt the sum of these, so
a prompt has a budget for what it waits in vain, over all its questions and reads together.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from cake_hf.errors import DeadlineExceeded
from cake_hf.util.forks import refusal

T = TypeVar("T")


class Late:
    """Given-up calls of one kind. While one of them hangs, another would hang too and cost one more thread.

    Finalizers also ask, and may run at any moment in any thread, so there is no lock, and each step is a single operation on
    the set.
    """

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    def __bool__(self) -> bool:
        self._threads.difference_update([thread for thread in self._threads.copy() if not thread.is_alive()])
        return bool(self._threads)

    def add(self, thread: threading.Thread) -> None:
        """Records the thread of a call that was given up."""
        self._threads.add(thread)


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The result of a call.

    Attributes:
        value: the returned value; None if the call failed.
        error: the raised error, or the error for a missing answer; None if all went well.
    """

    value: T | None = None
    error: BaseException | None = None

    @property
    def trouble(self) -> str:
        """The error as a sentence; empty if there was none."""
        return "" if self.error is None else in_words(self.error)

    def get(self) -> T:
        """Returns the value, or raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


class Call(Generic[T]):
    """A call in a thread of its own. Nothing that it raises propagates, whatever its base class.

    A call that hangs cannot be ended from outside; its (daemon) thread is left running.
    """

    def __init__(self, call: Callable[[], T], what: str) -> None:
        self._call: Callable[[], T] | None = call
        self._answer: Answer[T] | None = None
        self._what = what
        self.thread = threading.Thread(target=self._run, name=f"cake-{what}", daemon=True)

    def begin(self) -> None:
        """Starts the thread, unless it was started; if the system provides no thread, that error is the answer."""
        if self.thread.ident is not None:
            return
        error = refusal(self.thread)
        if error is not None:
            self._answer = Answer(error=error)

    def wait(self, seconds: float) -> Answer[T]:
        """Returns the answer; `DeadlineExceeded` if there is none within that time, or within the budget of the prompt.

        Anything raised in here comes from one of the user's signal handlers, never from the call.
        """
        budget = wait_budget()
        seconds = budget.grant(seconds)
        if self._answer is None:
            self.thread.join(seconds)
        if self._answer is not None:
            return self._answer
        budget.spend(seconds)
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
    """A call that has been started in a thread of its own and whose answer is wanted later.

    Args:
        what: what it is about, in a word.
        late: calls that were given up earlier: while there are any, this one is not started. Nor is it if the budget of the
            prompt is used up.
    """

    def __init__(self, call: Callable[[], T], what: str, late: Late | None = None) -> None:
        self._call: Call[T] | None = None
        self._late = late
        self._refusal = ""
        if late:
            self._refusal = f"An earlier question ({what}) is still not answered; nothing is asked until it is."
        elif not wait_budget().grant(1.0):
            self._refusal = f"This prompt has waited for the store in vain already and asks it nothing more ({what})."
        else:
            self._call = Call(call, what)
            self._call.begin()

    def answer(self, seconds: float) -> Answer[T]:
        """Waits that long for the answer, then gives the question up.

        Raises nothing but what the user's signal handlers raise.
        """
        if self._call is None:
            return Answer(error=DeadlineExceeded(self._refusal))
        try:
            return self._call.wait(seconds)
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Declares that the answer is no longer wanted."""
        if self._call is not None and self._late is not None and self._call.thread.is_alive():
            self._late.add(self._call.thread)


def ask(call: Callable[[], T], seconds: float, what: str, late: Late | None = None) -> Answer[T]:
    """Runs a call in a thread of its own and waits for it, but not for ever.

    Raises nothing but what the user's signal handlers raise.

    Args:
        seconds: to wait.
        what: what it is about, in a word.
        late: calls that were given up earlier: while there are any, this one is not started.
    """
    return Question(call, what, late).answer(seconds)


def in_words(error: BaseException) -> str:
    """Returns an error's text for the middle of a sentence, with its type if it has no text or is not an `Exception`."""
    text = str(error)
    return text if text and isinstance(error, Exception) else f"{type(error).__name__}: {text}".removesuffix(": ")


_current = threading.local()


class WaitBudget:
    """The budget of one prompt. Only waits that end without an answer are charged to it."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def grant(self, seconds: float) -> float:
        """Returns how many of these seconds may be waited; 0 if nothing more is to be asked."""
        return max(0.0, min(seconds, self._left))

    def spend(self, seconds: float) -> None:
        """Charges a wait that was in vain."""
        self._left -= seconds

    @contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Makes this the budget of what the thread asks meanwhile, unless it has one: then that is shared."""
        if getattr(_current, "budget", None) is not None:
            yield
            return
        _current.budget = self
        try:
            yield
        finally:
            _current.budget = None


def wait_budget() -> WaitBudget:
    """Returns the budget of the prompt that this thread is working on; an unlimited one if there is none."""
    budget: WaitBudget | None = getattr(_current, "budget", None)
    return WaitBudget(math.inf) if budget is None else budget
