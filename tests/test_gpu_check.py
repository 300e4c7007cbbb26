"""The GPU check around its stages: the budget, processes that fail or do not end, the results' file and the page."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import __main__ as command_line
from benchmarks.gpu_check import page
from benchmarks.gpu_check.goals import goals
from benchmarks.gpu_check.outcome import (
    CUT_SHORT,
    DONE,
    FAILED,
    LEFT_OUT,
    NO_GPU,
    NOT_HERE,
    RUNNING,
    Outcome,
    Plain,
    read,
    write,
)
from benchmarks.gpu_check.packages import wheels_in
from benchmarks.gpu_check.paper import CELLS
from benchmarks.gpu_check.runner import LEAST_SECONDS, Job, Runner, child_environment
from benchmarks.gpu_check.stages import BUDGET, STAGES, Stage, choose
from waiting import PATIENCE

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

LONG = 10 * PATIENCE
REFUSES = "raise ImportError('not here')\n"
GOOD, HANGS = "pass", "import time; time.sleep(1000)"
Said = dict[str, Plain]


class Check:
    """A check whose stages are small scripts; what each has in its file is there before its process begins."""

    def __init__(self, folder: Path, scripts: dict[str, tuple[str, Plain]], seconds: dict[str, float] | None = None):
        self.said: list[str] = []
        self.file = folder / "out" / "results.json"
        self.file.parent.mkdir(exist_ok=True)
        self.work = folder / "work"
        self.scripts = scripts
        self.kept_before: list[list[str]] = []
        stages = [Stage(name, name, (seconds or {}).get(name, LONG)) for name in scripts]
        outcome = Outcome(self.file, rehearsal=True, adds=False)
        self.runner = Runner(
            stages,
            outcome,
            folder / "out" / "log",
            self.command,
            self.said.append,
            self.work,
            budget=len(scripts) * LONG,
        )

    def command(self, job: Job) -> Sequence[str]:
        script, written = self.scripts[job.stage.name]
        self.kept_before.append(list(read(self.file).get("stages", {})))
        if written:
            write(job.file, written)
        return [sys.executable, "-I", "-S", "-c", script, str(job.folder)]

    def run(self) -> dict[str, Plain]:
        self.runner.run()
        stages: dict[str, Plain] = read(self.file)["stages"]
        return stages


def done(**result: Any) -> Plain:
    return {"status": DONE, "reason": "", "result": result}


def half(**result: Any) -> Plain:
    return {"status": RUNNING, "reason": "", "result": result}


@pytest.mark.parametrize(
    ("script", "written", "status", "reason"),
    [
        ("raise SystemExit(3)", {}, FAILED, "code 3"),
        ("raise SystemExit(3)", half(a=1), FAILED, "code 3"),
        ("import os; os.kill(os.getpid(), 11)", half(a=1), FAILED, "signal 11"),
        ("import os; os.abort()", {}, FAILED, "signal 6"),
        (GOOD, {}, FAILED, "without a result"),
        (GOOD, half(a=1), FAILED, "without a result"),
        (GOOD, {"status": FAILED, "reason": "KeyError", "result": {"a": 1}}, FAILED, "KeyError"),
        (GOOD, {"status": NOT_HERE, "reason": "no codec", "result": {}}, NOT_HERE, "no codec"),
        ("raise SystemExit(1)", done(a=1), DONE, ""),  # it had all, and stumbled on its way out
    ],
)
def test_a_stage_that_fails_takes_nothing_from_the_others(
    tmp_path: Path, script: str, written: Plain, status: str, reason: str
) -> None:
    check = Check(tmp_path, {"one": (GOOD, done(x=1)), "bad": (script, written), "three": (GOOD, done(x=3))})
    found = check.run()
    assert [stage["status"] for stage in found.values()] == [DONE, status, DONE]
    assert reason in found["bad"]["reason"]
    assert found["bad"].get("result", {}) == written.get("result", {})
    assert check.kept_before == [[], ["one"], ["one", "bad"]]  # each result is written before the next stage begins
    assert [line.partition(":")[0] for line in check.said] == ["one", "bad", "three"]
    assert list(check.work.iterdir()) == []


@pytest.mark.parametrize("written", [{}, half(a=1)])
def test_a_stage_that_does_not_end_is_cut_short_and_keeps_what_it_had(tmp_path: Path, written: Plain) -> None:
    scripts = {"slow": (HANGS, written), "next": (GOOD, done(x=1))}
    check = Check(tmp_path, scripts, {"slow": 0.2})
    check.runner.budget = LONG + 0.2
    found = check.run()
    assert (found["slow"]["status"], found["next"]["status"]) == (CUT_SHORT, DONE)
    assert found["slow"].get("result", {}) == written.get("result", {})
    assert "within its time" in found["slow"]["reason"]
    assert "slow: cut short after" in check.said[0]


def test_what_a_stage_has_started_ends_with_it(tmp_path: Path) -> None:
    """The process of the stage is through; one that it has started keeps a pipe open as long as it lives."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    script = (
        "import os, sys, time\n"
        f"end = os.open({str(pipe)!r}, os.O_WRONLY)\n"
        "if os.fork() == 0:\n"
        "    time.sleep(1000)\n"
        "os._exit(0)\n"
    )
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert Check(tmp_path, {"one": (script, done())}).run()["one"]["status"] == DONE
        os.set_blocking(reading, True)
        assert os.read(reading, 1) == b""  # the other end is closed
    finally:
        os.close(reading)


def test_a_process_that_cannot_be_started_is_a_failure(tmp_path: Path) -> None:
    check = Check(tmp_path, {"one": (GOOD, {}), "two": (GOOD, done())})
    started = check.command

    def missing(job: Job) -> Sequence[str]:
        return ["/no/such/program"] if job.stage.name == "one" else started(job)

    check.runner.command = missing
    found = check.run()
    assert (found["one"]["status"], found["two"]["status"]) == (FAILED, DONE)


@pytest.mark.parametrize("what", ["log", "results.json"])
def test_what_cannot_be_written_does_not_end_the_check(tmp_path: Path, what: str) -> None:
    """A folder stands in its place until the first stage is over, as a full disk might be emptied."""
    place = tmp_path / "out" / what
    place.mkdir(parents=True)
    check = Check(tmp_path, {"one": (GOOD, done(x=1)), "two": (GOOD, done(x=2))})
    told = check.runner.tell

    def tell(line: str) -> None:
        told(line)
        if place.is_dir():
            place.rmdir()

    check.runner.tell = tell
    found = check.run()
    assert found["two"]["status"] == DONE
    if what == "log":
        assert "could not be started: IsADirectoryError" in found["one"]["reason"]
    else:
        assert found["one"]["status"] == DONE
        assert check.said[0].endswith("(not written: IsADirectoryError)")


def test_without_a_gpu_no_further_stage_is_begun(tmp_path: Path) -> None:
    none = {"status": NO_GPU, "reason": "torch finds no GPU here", "result": {}}
    found = Check(tmp_path, {"one": (GOOD, none), "two": (GOOD, done()), "three": (GOOD, done())}).run()
    assert [stage["status"] for stage in found.values()] == [NO_GPU, LEFT_OUT, LEFT_OUT]
    assert found["three"]["reason"] == "torch finds no GPU here"


# The budget.


@pytest.mark.parametrize(
    ("took", "limits", "statuses"),
    [
        ((0, 0, 0), [30, 60, 100], [DONE] * 3),  # all that is left is for the last one
        ((5, 60, 0), [30, 55, 35], [DONE] * 3),  # what one leaves, the next may have; none takes from later ones
        ((30, 30, 30), [30, 30, 40], [DONE] * 3),
        ((91, 0, 0), [30], [DONE, LEFT_OUT, LEFT_OUT]),  # a stage that was hardly to be ended
        ((70, 0, 0), [30, 30, 30], [DONE] * 3),
    ],
)
def test_limits_add_up_to_the_budget(
    tmp_path: Path, took: Sequence[float], limits: list[float], statuses: list[str]
) -> None:
    now, seconds = 0.0, {"one": 20.0, "two": 30.0, "three": 40.0}
    times = dict(zip(seconds, took, strict=True))
    check = Check(tmp_path, {name: (GOOD, done()) for name in seconds}, seconds)
    started = check.command

    def later(job: Job) -> Sequence[str]:
        nonlocal now
        now += times[job.stage.name]
        return started(job)

    check.runner.budget, check.runner.clock, check.runner.command = 100, lambda: now, later
    found = check.run()
    assert [stage["status"] for stage in found.values()] == statuses
    assert [stage["limit"] for stage in found.values() if "limit" in stage] == limits
    assert all(limit >= LEAST_SECONDS for limit in limits)


def test_the_stages_fit_into_nine_minutes_and_the_table_says_so() -> None:
    table = dict(re.findall(r"^    (\w+) +\d+ +(\d+)", gpu_check.__doc__ or "", re.MULTILINE))
    estimates = dict(re.findall(r"^    (\w+) +(\d+) +\d+", gpu_check.__doc__ or "", re.MULTILINE))
    assert sum(stage.seconds for stage in STAGES) <= BUDGET <= 9 * 60 - 10
    assert table == {**{stage.name: f"{stage.seconds:g}" for stage in STAGES}, "all": f"{BUDGET:g}"}
    assert sum(int(estimates[stage.name]) for stage in STAGES) == int(estimates["all"])
    assert all(int(estimates[stage.name]) <= stage.seconds for stage in STAGES)


def test_stages_are_chosen_by_name() -> None:
    names = [stage.name for stage in STAGES]
    assert choose(STAGES) == list(STAGES)
    assert [stage.name for stage in choose(STAGES, "decoding")] == names[names.index("decoding") :]
    assert [stage.name for stage in choose(STAGES, only=["saving", "parity"])] == ["parity", "saving"]
    for first, only in (("weather", []), ("", ["weather"]), ("saving", ["parity"])):
        with pytest.raises(ValueError, match=r"no stage"):
            choose(STAGES, first, only)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_allocator_that_was_chosen_is_left_alone(name: str) -> None:
    assert "expandable" in child_environment({})[name]
    assert {key: value for key, value in child_environment({name: "x"}).items() if "ALLOC" in key} == {name: "x"}


# The results' file.


def test_a_later_run_adds_to_the_file_and_a_whole_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Outcome(path, rehearsal=False, adds=True)
    first.put("parity", {**done(a=1), "machine": {"cpu": "X", "gpu": "Y"}})
    first.put("saving", done(a=2))
    again = Outcome(path, rehearsal=False, adds=True)
    again.put("saving", {**done(a=3), "machine": {"cpu": "X", "disk_gib": 7}})
    assert read(path)["stages"] == {"parity": done(a=1), "saving": done(a=3)}
    assert read(path)["machine"] == {"cpu": "X", "gpu": "Y", "disk_gib": 7}
    assert Outcome(path, rehearsal=False, adds=False).content["stages"] == {}
    assert Outcome(path, rehearsal=True, adds=True).content["stages"] == {}  # no figures of a GPU beside rehearsed ones


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'])
def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    Outcome(path, rehearsal=False, adds=True).put("parity", done())
    assert list(read(path)["stages"]) == ["parity"]


# The page.


def figure(value: float, goal: str | None = None, met: bool | None = None) -> Plain:
    return {"label": "some figure", "value": value, "low": value, "high": value, "unit": "x", "goal": goal, "met": met}


def cell(
    source: str = "32gbps", *, gbps: float = 32.0, reached: float = 31.9, both: float = 1.0, **changes: Any
) -> Plain:
    return {
        "source": source,
        "gbps": gbps,
        "throttled": source.endswith("gbps"),
        "reached_gbps": reached,
        "eta_as_reached": 0.97,
        "load_seconds": figure(2.0),
        "both_seconds": figure(both),
        "limit_seconds": figure(0.96),
        "ratio": figure(0.5, "<= 1.02", True),
        "eta": figure(0.96, ">= 0.95", True),
        **changes,
    }


def measured(*cells: Plain, **stages: Plain) -> Plain:
    group = {"tokens": 16384, "compute_seconds": figure(4.0), "compute_over_plain": figure(1.01), "cells": list(cells)}
    grid = {"groups": [group], "left_out": ["8b, 4,096 tokens"], "parity": {"p": {"checks": 9, "mismatches": []}}}
    machine = {
        "cpu": "A Processor",
        "cores": 16,
        "gpu": "Some GPU",
        "gpu_memory_gib": 80,
        "driver": "1.2",
        "torch": "2.11",
    }
    return {"rehearsal": False, "machine": machine, "stages": {"ttft": done(grid=grid), **stages}}


def reached_of(result: Plain) -> dict[str, bool | None]:
    return {goal.what: goal.met for goal in goals(result)}


def test_goals_that_are_met_and_such_that_are_not_measured() -> None:
    met = reached_of(measured(cell(), cell(both=1.2)))
    assert met["eta, cells where both ends help"] is True
    assert met["restored prompts bit for bit as computed"] is True
    assert met["compute-only over plain chunked"] is True
    assert (
        met["mean speed-up over load-only and over compute-only, throttled cells"] is True
    )  # (2 + 4 + 1.67 + 3.33) / 4
    assert met["a decoded token over `DynamicCache`"] is None
    assert set(reached_of({}).values()) == {None}


@pytest.mark.parametrize(
    ("what", "result"),
    [
        ("restored prompts bit for bit as computed", measured(parity=done(runs=5, wrong=["llama: the logits differ"]))),
        ("restored prompts bit for bit as computed", measured(saving=done(parity={"checks": 2, "mismatches": ["x"]}))),
        ("eta, cells where both ends help", measured(cell(), cell(eta=figure(0.94, ">= 0.95", False)))),
        ("both ends over the better one, all cells", measured(cell(), cell(ratio=figure(1.03, "<= 1.02", False)))),
        ("mean speed-up over load-only and over compute-only, throttled cells", measured(cell(both=1.9))),
        ("loads over the slower of disk and copy", measured(loading=done(speed_2=figure(0.89)))),
        ("a decoded token over `DynamicCache`", measured(decoding=done(ratio=figure(0.91)))),
        ("first token, saving over not saving", measured(saving=done(first_token_ratio=figure(1.04)))),
        (
            "the first attention's bits as in a chunked `DynamicCache`",
            measured(attention=done(equal=False, equal_with=[])),
        ),
    ],
)
def test_a_goal_that_is_missed_is_said_to_be(what: str, result: Plain) -> None:
    assert reached_of(result)[what] is False
    assert re.search(rf"^\| {re.escape(what)} \|.*\*\*no\*\* \|$", page.of_result(result), re.MULTILINE)


def test_a_throttle_above_what_can_be_read_is_said_to_be_one() -> None:
    """T* is that of the rate that was reached: eta does not suffer from a line that never was as fast."""
    slow = cell("100gbps", gbps=100.0, reached=60.0, eta=figure(0.7, ">= 0.95", False), eta_as_reached=0.96)
    result = measured(slow)
    assert "| 100gbps | 100 (came to 60) |" in page.of_result(result)
    assert reached_of(result)["eta, cells where both ends help"] is True
    assert "came to" not in page.of_result(measured(cell(), cell("disk", reached=5.0)))


def test_the_papers_cells_stand_beside_ours() -> None:
    shown = page.of_result(measured(cell()))
    assert "| Llama-3.1-8B, 2 A100 | 16K | 32 | 1.37 | 3.18 | 2.00 | 4.00 |" in shown
    assert shown.count("another model") == 2 * (len(CELLS) - 1)
    assert "Some GPU (80 GiB, driver 1.2); A Processor, 16 cores" in shown


def test_nothing_that_went_wrong_is_hidden() -> None:
    wrong = done(runs=5, wrong=["llama, float32, sdpa: warm: the logits differ"])
    shown = page.of_result(measured(cell(), parity=wrong, serving={"status": CUT_SHORT, "reason": "it did not end"}))
    for words in ("warm: the logits differ", "serving: cut short", "it did not end", "8b, 4,096 tokens"):
        assert words in shown


def test_the_page_is_what_the_results_say() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.whole(page.stored()), "run python -m benchmarks.gpu_check.page"


def test_the_page_says_what_has_not_been_run() -> None:
    empty, filled = page.whole([]), page.whole([("some-gpu", measured(cell()))])
    assert page.NOT_RUN in empty
    assert page.NOT_RUN not in filled
    assert "## some-gpu" in filled
    for shown in (empty, filled):
        assert "scripts/gpu_check.sh OUT" in shown


@pytest.mark.parametrize("content", [{"rehearsal": True, "machine": {}, "stages": {}}, {"groups": []}, {}])
def test_a_rehearsal_is_no_result(tmp_path: Path, content: Plain) -> None:
    write(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=r"x\.json is not the result of a check on a GPU"):
        page.stored(tmp_path)


# The command.


@pytest.fixture
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        line = ["bash", str(SCRIPT), *map(str, arguments)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=LONG)

    return run


def test_one_command_with_carried_packages(tmp_path: Path, script: Callable[..., Any]) -> None:
    """One of these wheels is seen by any Python that finds it; two would break what imports them: they are not needed."""
    (tmp_path / "wheels").mkdir()
    carried = {"typer": REFUSES, "rich": REFUSES, "sitecustomize": "print('carried along')\n"}
    for name, source in carried.items():
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", source)
    out = tmp_path / "out"
    ran = script(out, "--rehearse", "--only", "ceilings", "--wheels", tmp_path / "wheels")
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gpu-check.json", "gpu-check.log", "gpu-check.md"]
    found = read(out / "gpu-check.json")
    assert [(name, stage["status"]) for name, stage in found["stages"].items()] == [("ceilings", DONE)]
    assert found["machine"]["torch"]
    assert "carried along" in (out / "gpu-check.log").read_text()
    assert "A rehearsal" in (out / "gpu-check.md").read_text()
    assert str(tmp_path) not in (out / "gpu-check.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "weather"], "There is no stage 'weather'"),
        (["--from=weather"], "choose from ceilings, parity"),
        (["--wheels", "/no/such/folder"], "There is no folder"),
        (["--wheels", str(ROOT / "scripts")], "There are no wheels"),
    ],
)
def test_what_there_is_not_is_refused_at_once(
    tmp_path: Path, script: Callable[..., Any], arguments: list[str], words: str
) -> None:
    ran = script(tmp_path / "out", *arguments)
    assert ran.returncode == 2
    assert words in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken-1-py3-none-any.whl").write_bytes(b"PK and no more")
    with pytest.raises(ValueError, match=r"broken-1-py3-none-any\.whl is no wheel"):
        wheels_in(tmp_path)


def stubbed(stage: str, *arguments: object) -> list[str]:
    """The command, in a process of its own, with a script in place of each stage."""
    script = (
        "import sys\n"
        "from benchmarks.gpu_check import __main__ as command_line\n"
        f"command = lambda job: [sys.executable, '-I', '-S', '-c', {stage!r}]\n"
        "command_line.child_command = lambda *, rehearse: command\n"
        "command_line.end_when_told()\n"
        "sys.exit(command_line.main(sys.argv[1:]))\n"
    )
    return [sys.executable, "-c", script, *map(str, arguments), "--rehearse"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_check_that_is_told_to_end_ends_its_stage_and_removes_what_it_made(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The stage's process has a pipe open as long as it lives."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    stage = f"import os, time; end = os.open({str(pipe)!r}, os.O_WRONLY); os.write(end, b'x'); time.sleep(1000)"
    command = stubbed(stage, tmp_path / "out", "--folder", tmp_path / "work")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            with pipe.open("rb", buffering=0) as reading:
                assert reading.read(1) == b"x"
                process.send_signal(number)
                assert process.wait(LONG) != 0
                assert reading.read(1) == b""
        finally:
            process.kill()
    assert list((tmp_path / "work").iterdir()) == []


def test_output_needs_no_reader(tmp_path: Path) -> None:
    """The terminal is gone, or the pipe: what is measured is measured all the same."""
    reader, end = os.pipe()
    os.close(reader)
    process = subprocess.run(
        stubbed(GOOD, tmp_path / "out"), cwd=ROOT, stdout=end, stderr=subprocess.PIPE, timeout=LONG, check=False
    )
    os.close(end)
    assert (process.returncode, process.stderr) == (0, b"")
    assert len(read(tmp_path / "out" / command_line.RESULTS)["stages"]) == len(STAGES)


def test_the_command_ends_well_whatever_its_stages_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = lambda job: [sys.executable, "-I", "-S", "-c", "raise SystemExit(1)"]  # noqa: E731
    monkeypatch.setattr(command_line, "child_command", lambda *, rehearse: broken)
    assert command_line.main([str(tmp_path), "--rehearse"]) == 0
    statuses = {stage["status"] for stage in read(tmp_path / command_line.RESULTS)["stages"].values()}
    assert statuses == {FAILED}
