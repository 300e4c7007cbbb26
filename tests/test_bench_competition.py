"""The competing load of the bench: that it takes what it is told to, rests when told to, and leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from benchmarks.grid import competition, competitor
from benchmarks.grid.competition import SCRIPT, Competition, demand, usable_cores
from cake_hf import CakeError


@pytest.mark.parametrize(
    ("share", "wanted"), [(1.0, (0, 0.0)), (0.75, (1, 0.25)), (0.5, (1, 0.5)), (0.25, (3, 0.25)), (0.1, (9, 0.1))]
)
def test_how_many_processes_leave_a_share(share: float, wanted: tuple[int, float]) -> None:
    each, part = demand(share)
    assert (each, part) == (wanted[0], pytest.approx(wanted[1]))
    assert 1 - each * part == pytest.approx(share)
    assert part <= 1 / (each + 1) + 1e-9  # what fair scheduling gives to each


@pytest.mark.parametrize("share", [0.0, 0.09, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"must be from 0.1 to 1"):
        Competition(share, "cpu")


def test_a_competitor_works_rests_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competition, "END_SECONDS", 60.0)  # beside others it may take long to leave by itself
    with Competition(0.5, "cpu") as others:
        assert others._processes == []  # nothing is started that is not needed
        for _ in range(2):
            with others.working():
                processes = list(others._processes)
                assert len(processes) == len(usable_cores())
                assert all(process.poll() is None for process in processes)
                if hasattr(os, "sched_getaffinity"):
                    assert [os.sched_getaffinity(process.pid) for process in processes] == [{n} for n in usable_cores()]
    assert [process.returncode for process in processes] == [0] * len(processes)


def test_a_share_of_one_starts_no_competitor() -> None:
    with Competition(1.0, "cpu") as others, others.working():
        assert others._processes == []


def test_a_competitor_that_has_died_is_an_error() -> None:
    with Competition(0.5, "cpu") as others:
        with others.working():
            pass
        others._processes[0].kill()
        others._processes[0].wait()
        with pytest.raises(CakeError, match="has ended"), others.working():
            pass


def test_a_competitor_ends_with_its_input() -> None:
    command = [sys.executable, "-I", str(SCRIPT), "cpu", "0.5"]
    told = subprocess.run(command, input="go\nrest\n", capture_output=True, text=True, timeout=60)
    assert told.returncode == 0
    assert set(told.stdout.split()) <= {"go", "rest"}


class Clock:
    """Time that passes only in sleep and work."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("part", [0.1, 0.25, 0.5, 1.0])
def test_it_takes_its_part_of_the_time(monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    clock, running, done = Clock(), threading.Event(), 0
    monkeypatch.setattr(competitor, "time", clock)
    running.set()

    def work() -> float:
        nonlocal done
        done += 1
        clock.now += 0.002
        if done == 500:
            running.clear()
        return 0.002

    competitor.compete(work, part, running)
    assert done * 0.002 / clock.now == pytest.approx(part, rel=0.01)


@pytest.mark.parametrize(("each", "count"), [(0.0002, 50), (0.004, 2), (0.03, 1)])
def test_a_gpu_is_given_work_in_bursts(each: float, count: int) -> None:
    """It is shared in slices of milliseconds: what is given piece by piece would hardly get its part."""
    asked: list[int] = []

    def multiply(products: int) -> float:
        asked.append(products)
        return products * each + (
            10.0 if len(asked) in (1, 3) else 0.0
        )  # the first is slow, and so is what has to wait

    work = competitor.in_bursts(multiply)
    assert work() == pytest.approx(count * each)
    assert asked == [1, competitor.CALIBRATION_ROUNDS, count]


def test_it_does_not_catch_up_in_bursts_after_others_had_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, running, ends = Clock(), threading.Event(), []
    monkeypatch.setattr(competitor, "time", clock)
    running.set()

    def work() -> float:
        clock.now += 10.0 if not ends else 0.002  # the first piece has to wait for others
        ends.append(clock.now)
        if len(ends) == 200:
            running.clear()
        return 0.002

    competitor.compete(work, 0.5, running)
    later = ends[-1] - ends[0]
    assert later >= 199 * 0.004 - competitor.MOST_DEBT - 0.01
