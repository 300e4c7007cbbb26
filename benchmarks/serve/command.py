"""`python -m benchmarks serve`: one stored prefix beside many short requests, in continuous batching; a table, and JSON."""

from __future__ import annotations

import json
import logging
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from benchmarks.figures import Figure, Goal, Result
from benchmarks.machine import describe
from benchmarks.table import build_tables
from benchmarks.timing import Sample
from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.models import load_model
from cake_hf.serving.support import require_engine

if TYPE_CHECKING:
    from benchmarks.serve.virtual import Run
    from benchmarks.serve.workload import Workload

SERVE_HELP = (
    "One long prompt with a stored prefix, and short requests, in transformers' continuous batching: both ends against "
    "loading alone and against transformers' own engine. Computing counts by the processor time of the engine's thread, and "
    "loads arrive one behind the other on that clock, so other processes hardly disturb it. Needs transformers 5.20."
)

SPANS = {0.5: 0.85, 1.0: 0.65, 2.0: 0.45}
"""Seconds to load the prefix by seconds to compute it -> goal for the span over that of loading alone."""


def serve_command(
    quick: Annotated[bool, typer.Option("--quick", help="Few and short prompts: only to see that it runs.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; 3, or 1 with --quick.")] = None,
    model: Annotated[
        str, typer.Option(help="A model to run in float32 instead of the small one: a folder, or a name on the Hub.")
    ] = "",
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of 512 tokens in the prefix.")] = 12,
    scale: Annotated[
        float, typer.Option(help="Length of the short prompts; 1 is 3:1 in tokens, as in the paper.")
    ] = 1.0,
    shorts: Annotated[int, typer.Option(min=1, help="Number of short prompts.")] = 22,
    spread: Annotated[
        float,
        typer.Option(
            help="Short prompts come over this many times the prefix's compute time; it comes behind a quarter."
        ),
    ] = 0.0,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Steps take what a formula says, so that the figures have no noise.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Take the measurements; see SERVE_HELP."""
    require_engine()
    from benchmarks.serve.workload import Workload

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    load = (
        Workload(chunk=64, chunks=3, shorts=4, scale=8.0)
        if quick
        else Workload(chunks=chunks, shorts=shorts, scale=scale)
    )
    try:
        result = measure(load, spread, rounds or (1 if quick or simulated else 3), model, simulated=simulated)
    finally:
        torch.set_num_threads(threads)
    text = json.dumps({"machine": describe(), **result.as_dict()})
    if out is not None:
        out.write_text(f"{text}\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        console.print(build_tables([result]))


def measure(load: Workload, spread: float, rounds: int, model: str = "", *, simulated: bool = False) -> Result:
    """Runs the workload in each way, in turns.

    Args:
        load: the workload.
        spread: over how many times the prefix's compute time the short prompts come.
        rounds: number of turns.
        model: a folder or a name on the Hub; by default the small one.
        simulated: whether steps take what a formula says, with a model that computes next to nothing.
    """
    from benchmarks.serve.virtual import StepCosts
    from benchmarks.serve.workload import Bench, least_model, small_model

    small = least_model if simulated else small_model
    runs_on = load_model(model, load.dtype, "cpu") if model else small(load.dtype)
    bench = Bench(runs_on, load, spread, StepCosts() if simulated else None)
    runs: dict[str, list[Run]] = {}
    ways = [("plain", 0.0), ("cold", 0.0), *((way, cell) for cell in SPANS for way in ("load", "both"))]
    with progress_bar("serving", "runs") as done:
        for turn in range(rounds):
            for number, (way, cell) in enumerate(ways):
                done(turn * len(ways) + number, rounds * len(ways))
                runs.setdefault(f"{way} {cell}", []).append(bench.run(way, cell))
    plain = runs["plain 0.0"]
    figures = {"cold": _ratio("cold, saving, span over the plain engine's", runs["cold 0.0"], plain, _span, Goal(1.03))}
    for cell, goal in SPANS.items():
        both, alone = runs[f"both {cell}"], runs[f"load {cell}"]
        named = f"load/compute {cell:g}: "
        goal = 0.8 if model else goal
        span = Goal(1.03) if spread else Goal(goal) if load.scale == 1 else None
        figures[f"span_{cell:g}"] = _ratio(f"{named}span over load-only", both, alone, _span, span)
        figures[f"ttft_{cell:g}"] = _ratio(f"{named}short TTFT over load-only", both, alone, _short, Goal(1.15))
        better = [min(one.span, other.span) for one, other in zip(plain, alone, strict=True)]
        gains = [best / run.span for best, run in zip(better, both, strict=True)]
        gain_goal = Goal(1.26, at_most=False) if cell == 1.0 and load.scale == 1 and not spread else None
        figures[f"gain_{cell:g}"] = Figure.of(
            f"{named}throughput over the better", Sample(tuple(gains)), "x", gain_goal
        )
        if not spread:
            shares = [bench.bound(cell) / run.span for run in both]
            bound = Goal(0.9, at_most=False)
            figures[f"bound_{cell:g}"] = Figure.of(f"{named}share of the bound", Sample(tuple(shares)), "x", bound)
    same = all(run.answers == plain[0].answers for several in runs.values() for run in several)
    details: dict[str, object] = {
        "model": Path(model).name,
        "workload": asdict(load),
        "spread": spread,
        "simulated": simulated,
        "prefix_seconds": bench.alone,
        "shorts_seconds": bench.others,
        "same_tokens": same,
        "runs": {name: [_plain(run) for run in several] for name, several in runs.items()},
    }
    words = "the same tokens in all runs" if same else "OTHER TOKENS in some runs"
    return Result(f"One prefix of {load.chunks} chunks beside {load.shorts} requests ({words})", figures, details)


def _span(run: Run) -> float:
    return run.span


def _short(run: Run) -> float:
    return statistics.mean(seconds for name, seconds in run.ttft.items() if name != "document")


def _ratio(label: str, above: list[Run], below: list[Run], of: Any, goal: Goal | None) -> Figure:
    return Figure.ratio(label, Sample(tuple(of(run) for run in above)), Sample(tuple(of(run) for run in below)), goal)


def _plain(run: Run) -> dict[str, object]:
    report = run.reports["document"]
    return {
        "span": run.span,
        "idle": run.idle,
        "steps": run.steps,
        "document_ttft": run.ttft["document"],
        "short_ttft": _short(run),
        "longest_gap": max(run.gaps, default=0.0),
        "loaded": report.chunks_loaded,
        "computed": report.chunks_computed,
    }
