"""`python -m benchmarks.gpu_check OUT`, in a checkout; `scripts/gpu_check.sh` also takes packages along."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check import page
from benchmarks.gpu_check.outcome import Outcome
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
    asked = parser.parse_args(arguments)
    try:
        stages = choose(STAGES, asked.first, asked.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(asked.out / RESULTS, rehearsal=asked.rehearse, adds=bool(asked.first or asked.only))
    command = child_command(rehearse=asked.rehearse)
    Runner(stages, outcome, asked.out / LOG, command, parent=asked.folder, budget=asked.budget).run()
    text = page.of_result(outcome.content)
    (asked.out / PAGE).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
