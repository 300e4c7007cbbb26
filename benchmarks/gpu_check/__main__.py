"""`python -m benchmarks.gpu_check OUT`, with this checkout's `src` on the path; `scripts/gpu_check.sh OUT` puts it there."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check import page
from benchmarks.gpu_check.outcome import Outcome
from benchmarks.gpu_check.packages import wheels_in
from benchmarks.gpu_check.runner import Runner, child_command
from benchmarks.gpu_check.stages import BUDGET, STAGES, choose

RESULTS, LOG, PAGE = "gpu-check.json", "gpu-check.log", "gpu-check.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; 2 if it was asked for something that there is not, else 0, whatever the stages came to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Check and measure the library on a GPU, in at most nine minutes. OUT gets "
        f"{RESULTS}, {LOG} and {PAGE}; a later run with --from or --only adds to them.",
    )
    names = ", ".join(stage.name for stage in STAGES)
    parser.add_argument("out", type=Path, help="the folder for the results")
    parser.add_argument("--from", dest="first", default="", metavar="STAGE", help=f"begin with this stage: {names}")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="take only this; may be repeated")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: only to see that it runs")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for all stages together")
    parser.add_argument("--folder", type=Path, help="make the (temporary) stores here, to measure this disk")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that are missing here")
    asked = parser.parse_args(arguments)
    try:
        stages = choose(STAGES, asked.first, asked.only)
        wheels = wheels_in(asked.wheels) if asked.wheels else []
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(asked.out / RESULTS, rehearsal=asked.rehearse, adds=bool(asked.first or asked.only))
    command, log = child_command(rehearse=asked.rehearse), asked.out / LOG
    Runner(stages, outcome, log, command, say, parent=asked.folder, budget=asked.budget, wheels=wheels).run()
    text = page.of_result(outcome.content)
    say(text)
    (asked.out / PAGE).write_text(text + "\n", encoding="utf-8")
    return 0


def say(text: str) -> None:
    """Print it, if anybody still listens: the check goes on when a terminal or a pipe is gone."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_when_told() -> None:
    """Makes a signal end the stage's process first, and remove what was made.

    Also SIGINT, which a shell has its background jobs ignore.
    """

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end)


if __name__ == "__main__":
    end_when_told()
    sys.exit(main())
