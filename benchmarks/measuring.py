"""Takes measurements one after the other with one model, and presents them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks import cached, decoding, identity, loading, memory, overheads, prompt, saving, strategies
from benchmarks.figures import Result
from benchmarks.machine import Machine, disturbance
from benchmarks.models import build_model, build_prompt
from benchmarks.own_model import without_goals
from benchmarks.settings import Settings
from benchmarks.table import build_tables
from benchmarks.workbench import Workbench, cheap_collections
from cake_hf.cli.console import WRONG, console, errors
from cake_hf.errors import CakeError
from cake_hf.util.redaction import shown

Measurements = Mapping[str, Callable[[Workbench], Result]]

MEASUREMENTS: dict[str, Callable[[Workbench], Result]] = {
    "strategies": strategies.measure,
    "saving": saving.measure,
    "decoding": decoding.measure,
    "memory": memory.measure,
    "cached": cached.measure,
    "identity": identity.measure,
    "loading": loading.measure,
    "overheads": overheads.measure,
}

OF_A_MODEL: dict[str, Callable[[Workbench], Result]] = {
    "prompt": prompt.measure,
    "decoding": decoding.measure,
    "strategies": strategies.measure,
    "saving": saving.measure,
    "cached": cached.measure,
}
"""The measurements for a user's own model; by default the first two."""


def measure_all(
    settings: Settings,
    parent: Path | None,
    tell: Callable[[str], None],
    measurements: Mapping[str, Callable[[Workbench], Result]] = MEASUREMENTS,
) -> tuple[dict[str, Any], list[Result]]:
    """Makes the model, takes all measurements, cleans up.

    Args:
        settings: of the run.
        parent: the directory to make stores in; None for the system's own temporary one.
        tell: called with a line of progress.
        measurements: those to take, by name.

    Returns:
        All that there is to say, JSON-ready; and the results for a table.
    """
    begin, machine = time.perf_counter(), Machine(settings.device)
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="cake-bench-", dir=parent) as folder, cheap_collections():
        bench = Workbench(settings, build_model(settings), build_prompt(settings), Path(folder))
        for name, measure in measurements.items():
            tell(f"measuring {name} ...")
            results[name] = _measured(name, measure, bench)
    outcome = {
        "machine": machine.as_dict(),
        "settings": settings.as_dict(),
        "results": {name: result.as_dict() for name, result in results.items()},
        "parity": bench.parity.as_dict(),
        "failures": [f"{name}: {result.failure}" for name, result in results.items() if result.failure],
        "seconds": time.perf_counter() - begin,
    }
    return outcome, list(results.values())


def progress(as_json: bool) -> Callable[[str], None]:
    """Returns the function for lines of progress: machines read none."""
    return _silent if as_json else _on_stderr


def hand_out(
    outcome: Mapping[str, Any], results: Sequence[Result], *, as_json: bool, line: bool = True, out: Path | None
) -> None:
    """Prints the tables and the line of JSON, and writes the latter to a file.

    Args:
        outcome: from `measure_all`, with anything added to it.
        results: from there, too.
        as_json: print no tables.
        line: print the line of JSON.
        out: the file; None for none.

    Raises:
        typer.Exit: a logit was wrong, or something could not be measured.
    """
    if not as_json:
        console.print(build_tables(results))
        if told := disturbance(outcome["machine"]):
            console.print(told, style="yellow")
    text = json.dumps(outcome)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    if line:
        typer.echo(text)
    faults = [*outcome["parity"]["mismatches"], *outcome["failures"]]
    if faults:
        errors.print(*faults, sep="\n", style="bold red")
        raise typer.Exit(WRONG)


def _measured(name: str, measure: Callable[[Workbench], Result], bench: Workbench) -> Result:
    """Takes one measurement; if it cannot be taken, the others still count."""
    try:
        return without_goals(measure(bench)) if bench.settings.model else measure(bench)
    except CakeError as error:
        return Result(name.capitalize(), {}, failure=shown(error))


def _on_stderr(line: str) -> None:
    errors.print(line, style="dim")


def _silent(line: str) -> None:
    """Drops the line: machines read no progress."""
