"""How long the first token takes, on the same work, in turns: each system beside its own run without a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.shootout import faults
from benchmarks.shootout.bench import Bench
from benchmarks.shootout.child import Child, NotStarted
from benchmarks.shootout.disks import NoDisk, SlowDisk
from benchmarks.shootout.questions import MEMORY, Question

PLAIN, COLD, FIRST, WARM, DISK, FOUR = "plain", "cold", "first", "memory", "disk", "four"
PACES = (320, 80, 20)
"""Megabytes per second of the throttled disk."""


class Runner:
    """One system's two processes, and the disk that the second one uses.

    The store is a symbolic link, which points at the directory, or at the same directory seen through a slow disk.

    Args:
        bench: the system.
        stack: closes what is opened here.

    Raises:
        NotStarted: the system does not come up.
    """

    def __init__(self, bench: Bench, stack: ExitStack) -> None:
        self._bench, self._stack = bench, stack
        self._link, self._raw = bench.new_folder("link"), bench.new_folder("raw")
        self._raw.mkdir()
        self._point(self._raw)
        self._memory: Child = stack.enter_context(bench.start(bench.new_folder("none"), role=MEMORY))
        self._disk: Child = stack.enter_context(bench.start(self._link))
        self._slow: SlowDisk | None = None
        self.no_slow_disk = ""
        try:
            self._slow = SlowDisk(bench.disk, self._raw, bench.new_folder("slow"))
            stack.callback(self._slow.close)
        except NoDisk as error:
            self.no_slow_disk = str(error)
        self.taken: list[dict[str, float]] = []
        self.nbytes = 0
        self._questions = [replace(question, new=1) for question in bench.documents[0]]

    def steps(self) -> dict[str, Callable[[dict[str, float]], None]]:
        """Returns what a round has, in order; each step adds its seconds."""
        return {
            PLAIN: self._plain,
            WARM: self._in_memory,
            COLD: self._cold,
            DISK: lambda taken: self._from_disk(taken, DISK),
            **({f"{pace}": self._throttled(pace) for pace in PACES} if self._slow else {}),
        }

    def _plain(self, taken: dict[str, float]) -> None:
        taken[PLAIN] = self._seconds(self._memory, replace(self._questions[0], reuse=False))

    def _in_memory(self, taken: dict[str, float]) -> None:
        """The first question brings the document; the system has forgotten it, or is asked after its run without a cache."""
        all_of_them = [self._seconds(self._memory, question) for question in self._questions]
        taken[FIRST], taken[WARM], taken[FOUR] = all_of_them[0], median(all_of_them[1:]), sum(all_of_them)

    def _cold(self, taken: dict[str, float]) -> None:
        shutil.rmtree(self._raw)
        self._raw.mkdir()
        taken[COLD] = self._seconds(self._disk, self._questions[0])
        self.nbytes = faults.used(self._raw)

    def _from_disk(self, taken: dict[str, float], name: str) -> None:
        taken[name] = self._seconds(self._disk, self._questions[1])

    def _throttled(self, pace: int) -> Callable[[dict[str, float]], None]:
        def step(taken: dict[str, float]) -> None:
            assert self._slow is not None
            self._slow.set_pace(str(pace))
            self._point(self._slow.path)
            try:
                self._from_disk(taken, f"{pace}")
            finally:
                self._point(self._raw)

        return step

    def _seconds(self, child: Child, question: Question) -> float:
        reply = child.ask(question, self._bench.patience)
        if reply.answer is None:
            raise NotStarted(reply.text)
        return reply.answer.seconds

    def _point(self, target: Path) -> None:
        self._link.unlink(missing_ok=True)
        self._link.symlink_to(target)


def measure(benches: Sequence[Bench], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns what each system took, in all rounds; the first round warms up and does not count.

    In each round every system takes each step before the next step begins.
    """
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        failed: dict[str, str] = {}
        for bench in benches:
            try:
                runners[bench.spec.name] = Runner(bench, stack)
            except NotStarted as error:
                failed[bench.spec.name] = str(error)
        for turn in range(rounds + 1):
            say(f"round {turn} of {rounds}")
            taken: dict[str, dict[str, float]] = {name: {} for name in runners}
            for step in (PLAIN, WARM, COLD, DISK, *map(str, PACES)):
                for name, runner in runners.items():
                    act = runner.steps().get(step)
                    if act is not None and name not in failed:
                        try:
                            act(taken[name])
                        except NotStarted as error:
                            failed[name] = f"{step}: {error}"
            if turn:
                for name, runner in runners.items():
                    runner.taken.append(taken[name])
        return {
            name: {"failure": failed.get(name, "")}
            | (
                {
                    "rounds": runners[name].taken,
                    "nbytes": runners[name].nbytes,
                    "no_slow_disk": runners[name].no_slow_disk,
                }
                if name in runners
                else {}
            )
            for name in (bench.spec.name for bench in benches)
        }
