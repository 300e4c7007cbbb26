"""Waiting for what other threads do, with an end that fails the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from cake_hf import StoreError

PATIENCE = 60.0
"""Seconds after which something that has to happen is taken not to happen."""

Result = TypeVar("Result")


def await_true(condition: Callable[[], bool]) -> None:
    """For a moment that cannot be signalled: that a thread has come to where it waits, or is through with something."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def await_answer(call: Callable[[], Result]) -> Result:
    """What the call gives once its store works: an impatient store on a busy machine may need more than one attempt."""
    answers: list[Result] = []

    def ask() -> bool:
        with suppress(StoreError):
            answers.append(call())
        return bool(answers)

    await_true(ask)
    return answers[0]


def loaders() -> list[threading.Thread]:
    """The threads of all prompts that load chunks or snapshots just now."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("cake-load")]


def join_loaders() -> None:
    """A load that was overtaken may still be under way when its prompt is done; this is when it has ended."""
    for thread in loaders():
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread.name} does not end"
