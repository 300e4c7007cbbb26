"""`python -m benchmarks grid`: options in; a bar while it runs, tables, plots and one line of JSON out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.grid import plots
from benchmarks.grid.axes import PRESETS, with_options
from benchmarks.grid.run import Grid, run, step_count
from benchmarks.grid.show import build
from benchmarks.settings import SHAPES, Dtype
from cake_hf.cli.console import WRONG, console, errors
from cake_hf.cli.models import find_device
from cake_hf.errors import CakeError
from cake_hf.plots import require_matplotlib
from cake_hf.util.redaction import shown

GRID_HELP = (
    "Measure the grid: model x length x share of compute left x store, both ends against each alone and against peers.\n\n"
    "The table compares figures with goals, which never decide the exit code; it is 1 only if a restored prompt gave other "
    "logits than a computed one, or something could not be measured.\n\n"
    "On a GPU the preset first checks that restoring is exact there, then measures the 8b model at 4K to 32K tokens, and "
    "decoding. It leaves out what would take more than eight minutes, and says so; further commands measure the rest:\n\n"
    "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\n\n"
    "python -m benchmarks grid --device cuda --out benchmarks/results/gpu-8b.json\n\n"
    "python -m benchmarks grid --device cuda --out benchmarks/results/gpu-8b-shared.json --shares 0.5 --no-parity "
    "--no-peers\n\n"
    "python -m benchmarks grid --device cuda --out benchmarks/results/gpu-1b.json --shape 1b --shares 1 --repeats 5\n\n"
    "Without the first line the growing caches of other runs fragment the GPU's memory, and the next run waits until it is "
    "compacted.\n\n"
    "The 8b model at 32K tokens takes about 30 GB of GPU memory, 25 GB of memory and 21 GB of disk; with --no-peers a third of "
    "the memory and a quarter of the disk."
)


class Preset(StrEnum):
    """The preset that the options start from."""

    CPU = "cpu"
    GPU = "gpu"
    QUICK = "quick"


def grid_command(
    preset: Annotated[
        Preset | None, typer.Option(help="The preset for all other options; by default that of the device.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto is the GPU if there is one.")] = "auto",
    shape: Annotated[str | None, typer.Option(help=f"Models, separated by commas: {', '.join(SHAPES)}.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of the cached prefix, e.g. 4096,8192.")] = None,
    shares: Annotated[
        str | None, typer.Option(help="Shares of the device's compute that a competing load leaves, e.g. 1,0.5.")
    ] = None,
    stores: Annotated[
        str | None,
        typer.Option(
            help="memory, disk, a throttle like 32gbps, or one like 0.5x: loading takes half as long as computing."
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds; in each, everything is run once.")
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens per chunk.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="The dtype of the weights, and so of the KV.")] = None,
    peers: Annotated[
        bool | None, typer.Option(help="Also measure whole caches saved with torch and safetensors.")
    ] = None,
    parity: Annotated[bool | None, typer.Option(help="First check on this device that restoring is exact.")] = None,
    decode: Annotated[bool | None, typer.Option(help="At the end, compare decoding at the longest length.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Start nothing that is not expected to end by then; 0 for no limit.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Make the (temporary) stores in this directory, to measure its disk."),
    ] = None,
    plot_folder: Annotated[
        Path | None, typer.Option("--plots", help="Write PNGs to this directory (needs matplotlib).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file, again after each group.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the line of JSON.")] = False,
) -> None:
    """Measure all combinations of the axes; see GRID_HELP."""
    if plot_folder is not None:
        require_matplotlib()
    target = str(find_device(device))
    chosen = PRESETS[preset.value if preset else "gpu" if target.startswith("cuda") else "cpu"]
    axes = with_options(
        chosen,
        device=target,
        shapes=shape,
        lengths=lengths,
        shares=shares,
        stores=stores,
        repeats=repeats,
        chunk_size=chunk_size,
        dtype=dtype.value if dtype else None,
        peers=peers,
        parity=parity,
        decode=decode,
        minutes=minutes,
    )
    with _progress(step_count(axes), shown=not as_json) as step:
        grid = run(axes, folder, step, lambda so_far: _write(so_far, out))
    outcome = grid.as_dict()
    if plot_folder is not None:
        plots.draw(outcome, plot_folder)
    if not as_json:
        console.print(build(grid))
    typer.echo(json.dumps(outcome))
    if grid.faults:
        errors.print(*grid.faults, sep="\n", style="bold red")
        raise typer.Exit(WRONG)


def _write(grid: Grid, out: Path | None) -> None:
    """Replaces the file as a whole, so that it always holds the results so far."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(json.dumps(grid.as_dict()) + "\n")
    os.replace(partial, out)


def plot_command(
    results: Annotated[Path, typer.Argument(help="A file written by `python -m benchmarks grid --out`.")],
    folder: Annotated[Path, typer.Argument(help="The directory for the PNGs; created if missing.")],
) -> None:
    """Plot a grid that was measured before, here or on another machine (needs matplotlib)."""
    try:
        outcome = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CakeError(
            f"{results} cannot be read as the outcome of `python -m benchmarks grid --out`: {error}"
        ) from error
    for path in plots.draw(outcome, folder):
        console.print(shown(str(path)), soft_wrap=True)


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Shows a bar on stderr until all is done, or a line per group if stderr is no terminal.

    Yields a function to be called with the next run, `group: run`.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not (shown and errors.is_terminal)) as progress:
        task, group = progress.add_task("", total=total, completed=-1), ""

        def step(what: str) -> None:
            nonlocal group
            progress.update(task, description=what, advance=1)
            if progress.tasks[task].completed > total:  # disturbed runs are repeated
                progress.update(task, total=progress.tasks[task].completed)
            if shown and not errors.is_terminal and (now := what.partition(":")[0]) != group:
                group = now
                errors.print(f"{group} ...", style="dim")

        yield step
