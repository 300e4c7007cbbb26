"""A system's process as seen from outside: every wait has an end, and what comes instead of an answer has a name."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.children import ROOT
from benchmarks.shootout.questions import Answer, Options, Question
from benchmarks.shootout.side import CLOSE

START_SECONDS = 300.0
END_SECONDS = 20.0

MOST_PATIENCE = 10
STARVED = (0.02, 0.5)
"""A process that has used such a share of the time is neither waiting for something nor busy with something endless."""

ANSWER, ERROR, HANG = "answer", "error", "hang"


@dataclass(frozen=True)
class Reply:
    """What a question got.

    Attributes:
        kind: ANSWER, ERROR or HANG.
        answer: if there is one.
        text: of the error; of a process that ended, its last words.
    """

    kind: str
    answer: Answer | None = None
    text: str = ""


class NotStarted(RuntimeError):
    """The system did not come up; the message is what it said."""


class Child:
    """One process.

    Args:
        python: the interpreter.
        options: what it is told.
        environment: its variables.
        log: file for what it prints.

    Raises:
        NotStarted: it did not come up.
    """

    def __init__(self, python: str, options: Options, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("ab") as told:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.shootout.side", *options.arguments()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
                cwd=ROOT,
                env=dict(environment),
            )
        self._begun = b""
        ready = self._line(START_SECONDS)
        if ready is None or "ready" not in ready:
            self.kill()
            raise NotStarted((ready or {}).get("error") or f"It was not ready in {START_SECONDS:g} s.")

    def ask(self, question: Question, seconds: float) -> Reply:
        """Asks, and waits for the reply so long."""
        self.send(question)
        return self.receive(seconds)

    def send(self, question: Question) -> None:
        """Asks, and does not wait."""
        self._write(question.as_dict())

    def receive(self, seconds: float) -> Reply:
        """Returns the reply to the question sent before.

        On a machine with too much to do, a process that gets little of the processors is given more time.
        """
        begin, cpu = time.monotonic(), _cpu_seconds(self._process.pid)
        line = self._line(seconds)
        for _ in range(MOST_PATIENCE - 1):
            if line is not None or not starved(_cpu_seconds(self._process.pid) - cpu, time.monotonic() - begin):
                break
            line = self._line(seconds)
        if line is None:
            return Reply(HANG, text=f"no answer in {time.monotonic() - begin:.0f} s")
        if "error" in line:
            return Reply(ERROR, text=line["error"])
        return Reply(ANSWER, Answer(**line))

    @property
    def waits(self) -> bool:
        """Whether there is nothing to receive yet."""
        return not select.select([self._pipe(self._process.stdout)], [], [], 0)[0]

    def close(self, seconds: float) -> Reply | None:
        """Has the system save all and end; returns a reply only if it could not."""
        self._write(CLOSE)
        line = self._line(seconds)
        if line is None:
            return Reply(HANG, text=f"it did not close in {seconds:g} s")
        return Reply(ERROR, text=line["error"]) if "error" in line else None

    def kill(self) -> None:
        """Ends the process as `kill -9` does; one that the system cannot end is left to it."""
        self._process.kill()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                self._pipe(pipe).close()
            except OSError:  # what was not taken any more
                continue

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _write(self, said: object) -> None:
        pipe = self._pipe(self._process.stdin)
        try:
            pipe.write(json.dumps(said).encode() + b"\n")
            pipe.flush()
        except OSError:  # it has ended; receive says so
            return

    def _line(self, seconds: float) -> dict[str, Any] | None:
        """Returns the next line; None if there is none in time; an error if the process has ended."""
        end, pipe = time.monotonic() + seconds, self._pipe(self._process.stdout)
        while b"\n" not in self._begun:
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            found = os.read(pipe.fileno(), 1 << 16)
            if not found:
                return {"error": f"The process ended with exit code {self._process.wait()}. {_last_words(self._log)}"}
            self._begun += found
        line, _, self._begun = self._begun.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def starved(used: float, waited: float) -> bool:
    """Returns whether a process has used such a share of the time that it rather waits for the processors."""
    return STARVED[0] * waited < used < STARVED[1] * waited


def _cpu_seconds(pid: int) -> float:
    """Returns the processor time that a process has used; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
