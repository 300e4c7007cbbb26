"""`cake-hf bench`: settings in, a table for people and one line of JSON out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cake_hf.arithmetic.errors import CakeError
from cake_hf.arithmetic.limits import MIN_CHUNK_SIZE
from cake_hf.arithmetic.outside import shown
from cake_hf.people.bench import cached, decoding, identity, loading, memory, overheads, prompt, saving, strategies
from cake_hf.people.bench.grid.command import GRID_HELP, grid_command, plot_command
from cake_hf.people.bench.machine import Machine, disturbance
from cake_hf.people.bench.models import build_model, build_prompt
from cake_hf.people.bench.own_model import own_settings, without_goals
from cake_hf.people.bench.results import Result
from cake_hf.people.bench.settings import SHAPES, Dtype, Settings, choose
from cake_hf.people.bench.stores.command import STORES_HELP, stores_command
from cake_hf.people.bench.table import build_tables
from cake_hf.people.bench.workbench import Workbench, cheap_collections
from cake_hf.people.console import WRONG, console, errors
from cake_hf.people.models import find_device

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
"""What is measured with a model of the user's; by default the first two."""


HELP = (
    "Measure this machine: both ends against each alone, saving, decoding, memory, a full hit against the bare disk, "
    "the weights' checksum, loading against bare reads, bookkeeping.\n\n"
    "The model has random weights and is made on the spot; --model takes one of yours, for which nothing is judged. "
    "Goals are judged in the table and never decide the exit code; it is "
    "1 only if a restored prompt gave other logits than a computed one, or something could not be measured.\n\n"
    "For one length; `cake-hf bench grid` goes over lengths, stores, models and shares of the device. `cake-hf bench stores` "
    "measures each store beside its client."
)

bench_app = typer.Typer(invoke_without_command=True, no_args_is_help=False)
bench_app.command("grid", help=GRID_HELP)(grid_command)
bench_app.command("plot")(plot_command)
bench_app.command("stores", help=STORES_HELP)(stores_command)


@bench_app.callback(help=HELP)
def bench(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A model of yours, by folder or name: what it gives there, without goals.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print only the line of JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, two rounds: only to see that it runs.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds; 5, or 2 with --quick.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the cached prefix; 8192, or 512 with --quick.")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=MIN_CHUNK_SIZE, help="Tokens per chunk; 512, or 64 with --quick.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights, and so of the KV.")] = Dtype.BFLOAT16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto is the GPU where there is one.")] = "auto",
    shape: Annotated[
        str | None, typer.Option(help=f"{', '.join(SHAPES)}; small, or 1b on a GPU, or tiny with --quick.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Make the (temporary) stores in this directory, to measure its disk.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Take only this measurement: {', '.join(MEASUREMENTS)}. May be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Take single measurements; see HELP."""
    if context.invoked_subcommand is not None:
        refuse_options(context)
        return
    asked: dict[str, Any] = {"quick": quick, "repeats": repeats, "tokens": tokens, "chunk_size": chunk_size}
    where = str(find_device(device))
    if model:
        if shape:
            raise ValueError("--model brings a shape of its own; leave out --shape.")
        source = context.get_parameter_source("dtype")
        given = dtype.value if source is not None and source.name == "COMMANDLINE" else "auto"
        settings = own_settings(model, **asked, dtype=given, device=where)
        measurements = _chosen(only or list(OF_A_MODEL)[:2], OF_A_MODEL)
    else:
        settings = choose(**asked, dtype=dtype.value, device=where, shape=shape)
        measurements = _chosen(only, MEASUREMENTS)
    outcome, results = measure_all(settings, store, _silent if as_json else _on_stderr, measurements)
    if not as_json:
        console.print(build_tables(results))
        if told := disturbance(outcome["machine"]):
            console.print(told, style="yellow")
    line = json.dumps(outcome)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    if as_json or not model:
        typer.echo(line)
    faults = [*outcome["parity"]["mismatches"], *outcome["failures"]]
    if faults:
        errors.print(*faults, sep="\n", style="bold red")
        raise typer.Exit(WRONG)


def refuse_options(context: typer.Context) -> None:
    """An option before the sub-command would be lost in silence.

    Raises:
        ValueError: there is one.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"Give the options after the sub-command: cake-hf bench {context.invoked_subcommand} ...")


def measure_all(
    settings: Settings,
    parent: Path | None,
    tell: Callable[[str], None],
    measurements: Mapping[str, Callable[[Workbench], Result]] = MEASUREMENTS,
) -> tuple[dict[str, Any], list[Result]]:
    """Make the model, take all measurements, clean up.

    Args:
        settings: of the run.
        parent: the directory to make stores in; None for the system's own temporary one.
        tell: called with a line of progress.
        measurements: to take, by name.

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


Measurements = Mapping[str, Callable[[Workbench], Result]]


def _chosen(names: list[str] | None, among: Measurements) -> Measurements:
    unknown = sorted(set(names or ()) - set(among))
    if unknown:
        raise ValueError(f"There is no measurement {unknown[0]!r}; choose from {', '.join(among)}.")
    return {name: measure for name, measure in among.items() if not names or name in names}


def _measured(name: str, measure: Callable[[Workbench], Result], bench: Workbench) -> Result:
    """One measurement; if it cannot be taken, the others still count."""
    try:
        return without_goals(measure(bench)) if bench.settings.model else measure(bench)
    except CakeError as error:
        return Result(name.capitalize(), {}, failure=shown(error))


def _on_stderr(line: str) -> None:
    errors.print(line, style="dim")


def _silent(line: str) -> None:
    """Machines read no progress."""
