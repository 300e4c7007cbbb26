"""Runs the stages one after the other, each in a process of its own, and keeps to the budget. Standard library only.

Nothing that a stage does ends the check: it may fail, crash, hang or find no time. That is noted, and the next one begins.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.children import environment
from benchmarks.gpu_check.outcome import CUT_SHORT, DONE, FAILED, LEFT_OUT, NO_GPU, RUNNING, Outcome, Plain, read
from benchmarks.gpu_check.packages import unpack
from benchmarks.gpu_check.stages import BUDGET, Stage

LEAST_SECONDS = 10.0
"""With less left no stage is begun: Python, torch and CUDA take about that long to start."""
END_SECONDS = 10.0
"""How long a killed process may take to be gone."""

PACKAGES = "packages"

ALLOCATOR = "expandable_segments:True"
"""Otherwise growing caches leave the GPU's memory in pieces, and the next stage waits until it is tidied up."""


@dataclass(frozen=True)
class Job:
    """What a stage's process is told.

    Attributes:
        stage: to run.
        until: when it is ended, in seconds since the epoch.
        file: for its result.
        folder: for what it makes, removed after it.
        shared: for what later stages use, too.
    """

    stage: Stage
    until: float
    file: Path
    folder: Path
    shared: Path


Command = Callable[[Job], Sequence[str]]


def child_command(*, rehearse: bool) -> Command:
    """The command line of a stage's process."""

    def command(job: Job) -> list[str]:
        name, paths = job.stage.name, (str(path) for path in (job.file, job.folder, job.shared))
        line = [sys.executable, "-m", "benchmarks.gpu_check.child", name, f"{job.until:.3f}", *paths]
        return [*line, "--rehearse"] if rehearse else line

    return command


def child_environment(given: Mapping[str, str], packages: Path | None = None) -> dict[str, str]:
    """The variables of a stage's process.

    Args:
        given: those of this one. No allocator is put in place of one that was chosen.
        packages: a folder to import from as well.
    """
    chosen = any(name in given for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    own = {} if chosen else {"PYTORCH_ALLOC_CONF": ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR}
    if packages is not None:
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (given.get("PYTHONPATH"), str(packages))))
    return {**given, **own, "PYTHONUNBUFFERED": "1"}


@dataclass
class Runner:
    """One check.

    Attributes:
        stages: to run, in order.
        outcome: where results go.
        log: what the processes print goes there.
        command: of a stage's process.
        tell: called with a line for people.
        parent: the directory for stores; None for the system's own temporary one.
        budget: seconds for all.
        wheels: of packages that the processes are to find.
    """

    stages: Sequence[Stage]
    outcome: Outcome
    log: Path
    command: Command
    tell: Callable[[str], None] = print
    parent: Path | None = None
    budget: float = BUDGET
    wheels: Sequence[Path] = ()
    clock: Callable[[], float] = time.monotonic

    def run(self) -> None:
        """Run all stages."""
        end = self.clock() + self.budget
        if self.parent is not None:
            self.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="cake-gpu-check-", dir=self.parent))
        missing = ""
        try:
            unpack(self.wheels, work / PACKAGES)
            for number, stage in enumerate(self.stages):
                left = end - self.clock()
                later = sum(other.seconds for other in self.stages[number + 1 :])
                if missing or left < LEAST_SECONDS:
                    found: Plain = {"status": LEFT_OUT, "reason": missing or "no time was left"}
                else:
                    found = self._stage(stage, work, min(left, max(stage.seconds, left - later)))
                if found["status"] == NO_GPU:
                    missing = str(found.get("reason"))
                self.tell(_line(stage, found) + self._put(stage, found))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _put(self, stage: Stage, found: Plain) -> str:
        """Keep a result; what cannot be written now is written with the next one."""
        try:
            self.outcome.put(stage.name, found)
        except OSError as error:
            return f" (not written: {type(error).__name__})"
        return ""

    def _stage(self, stage: Stage, work: Path, seconds: float) -> Plain:
        begin = self.clock()
        job = Job(stage, time.time() + seconds, work / f"{stage.name}.json", work / stage.name, work / "shared")
        try:
            how = self._process(job, seconds, work / PACKAGES if self.wheels else None)
        except OSError as error:  # no such program, no space left, ...
            how = f"its process could not be started: {type(error).__name__}"
        found = _judged(read(job.file), how)
        shutil.rmtree(job.folder, ignore_errors=True)
        return {**found, "title": stage.title, "seconds": round(self.clock() - begin, 1), "limit": round(seconds, 1)}

    def _process(self, job: Job, seconds: float, packages: Path | None) -> str:
        for path in (job.folder, job.shared):
            path.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"== {job.stage.name}, at most {seconds:.0f} s\n")
            log.flush()
            return _watched(self.command(job), seconds, log, packages)


def _judged(found: Plain, how: str) -> Plain:
    """What a stage came to, from what it wrote and how its process ended."""
    if found.get("status", RUNNING) != RUNNING:
        return found
    if how == CUT_SHORT:
        return {**found, "status": CUT_SHORT, "reason": "it did not end within its time; what it had by then is here"}
    return {**found, "status": FAILED, "reason": how or "its process ended without a result"}


def _watched(command: Sequence[str], seconds: float, log: IO[str], packages: Path | None) -> str:
    """Run a process to its end, or to that of its time; empty if it ended well by itself, else how it ended."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=child_environment(environment(), packages),
        start_new_session=True,
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return CUT_SHORT
    finally:
        _end(process)
    if code < 0:
        return f"its process was ended by signal {-code}"
    return f"its process ended with code {code}" if code else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it has started; does not wait if the system cannot end it."""
    with suppress(ProcessLookupError, PermissionError):  # the latter is what macOS says of a group that has ended
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


def _line(stage: Stage, found: Plain) -> str:
    seconds = f" after {found['seconds']:.0f} s of {found['limit']:.0f}" if "seconds" in found else ""
    reason = f": {found['reason']}" if found.get("reason") else ""
    return f"{stage.name}: {found.get('status', DONE)}{seconds}{reason}"
