"""A system for the tests of the shoot-out: it keeps a document's tokens in a file, and has the faults it is told to have.

It runs as a system does, in a process of its own, with nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

from benchmarks.shootout.questions import DISK, Answer, Options, Question, System


class Planted:
    """Answers with a function of what it believes to have: document, weights, dtype and adapter."""

    def __init__(self, options: Options) -> None:
        if "never-up" in options.extra:
            raise RuntimeError("it does not come up")
        self._options = options

    def ask(self, question: Question) -> Answer:
        computed = self._state(question)
        if "fails-once" in self._options.extra and question.reuse:
            self._options.extra.remove("fails-once")
            raise OSError("for once")
        if not question.reuse or self._options.role != DISK:
            return _answer(computed, question, 0)
        file = self._options.folder / f"{question.name}.json"
        if not file.exists():
            self._options.folder.mkdir(exist_ok=True)
            file.write_text(json.dumps(computed))
            return _answer(computed, question, 0)
        return self._restored(computed, question, file.read_text())

    def _restored(self, computed: list[object], question: Question, text: str) -> Answer:
        if "hangs" in self._options.extra:
            threading.Event().wait()
        if "ends" in self._options.extra:
            os._exit(3)
        if "wrong" in self._options.extra:
            return _answer(["wrong", ""], question, question.document)
        try:
            found = json.loads(text)
        except ValueError:
            if "careful" not in self._options.extra:
                raise
            found = None
        if "careful" in self._options.extra and found != computed:
            return _answer(computed, question, 0)
        return _answer(found, question, question.document)

    def _state(self, question: Question) -> list[object]:
        """Returns all that its answer depends on, and behind it the tenant; a careful one wants a file with the same."""
        options = self._options
        private = options.tenant if "careful" in options.extra else ""
        return [
            question.ids[: question.document],
            Path(options.model).name,
            options.dtype,
            bool(options.adapter),
            private,
        ]

    def close(self) -> None:
        if "bad-end" in self._options.extra:
            raise OSError("no room to save")


def _answer(state: list[object], question: Question, loaded: int) -> Answer:
    seed = int(hashlib.sha256(repr((state[:-1], question.ids)).encode()).hexdigest(), 16)
    return Answer([seed % (1009 + at) for at in range(question.new)], 0.01, loaded)


def make(options: Options) -> System:
    return Planted(options)
