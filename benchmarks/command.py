"""`python -m benchmarks`: options in, a table for people and one line of JSON out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.adapt import ADAPT_HELP, adapt_command
from benchmarks.codec.command import CODEC_HELP, codec_command
from benchmarks.grid.command import GRID_HELP, grid_command, plot_command
from benchmarks.measuring import MEASUREMENTS, OF_A_MODEL, Measurements, hand_out, measure_all, progress
from benchmarks.own_model import own_settings
from benchmarks.serve.command import SERVE_HELP, serve_command
from benchmarks.settings import SHAPES, Dtype, choose
from benchmarks.shootout.command import SHOOTOUT_HELP, shootout_command
from benchmarks.simulation.command import simulate_command
from benchmarks.stores.command import STORES_HELP, stores_command
from benchmarks.traces.command import traces_app
from cake_hf.cli.console import PlainErrors
from cake_hf.cli.models import find_device
from cake_hf.limits import MIN_CHUNK_SIZE

HELP = (
    "Measure this machine: both ends against each alone, saving, decoding, memory, a full hit against the bare disk, "
    "the weights' checksum, loading against bare reads, bookkeeping.\n\n"
    "The model has random weights and is made on the spot; --model takes one of yours, which has no goals. "
    "The table compares figures with goals, which never decide the exit code; it is "
    "1 only if a restored prompt gave other logits than a computed one, or something could not be measured.\n\n"
    "It measures one length; `grid` goes over lengths, stores, models and shares of the device. `stores` "
    "measures each store beside its client, `adapt` how soon a cache follows a change, `serve` a restore beside other "
    "requests, `codec` the size and speed of encoded KV, `shootout` other systems; `simulate` runs restores on a virtual "
    "clock, `traces` replays many prompts that share prefixes."
)

bench_app = typer.Typer(
    cls=PlainErrors,
    invoke_without_command=True,
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
bench_app.command("grid", help=GRID_HELP)(grid_command)
bench_app.command("plot")(plot_command)
bench_app.command("stores", help=STORES_HELP)(stores_command)
bench_app.command("adapt", help=ADAPT_HELP)(adapt_command)
bench_app.command("codec", help=CODEC_HELP)(codec_command)
bench_app.command("serve", help=SERVE_HELP)(serve_command)
bench_app.command("shootout", help=SHOOTOUT_HELP)(shootout_command)
bench_app.command("simulate")(simulate_command)
bench_app.add_typer(traces_app, name="traces")


@bench_app.callback(help=HELP)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model of yours, by folder or name: what it gains, without goals.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print only the line of JSON.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a tiny model and two rounds, only to see that it runs.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Number of rounds; 5, or 2 with --quick.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the cached prefix; 8192, or 512 with --quick.")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=MIN_CHUNK_SIZE, help="Tokens per chunk; 512, or 64 with --quick.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the weights, and so of the KV.")] = Dtype.BFLOAT16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto is the GPU if there is one.")] = "auto",
    shape: Annotated[
        str | None, typer.Option(help=f"{', '.join(SHAPES)}; small, or 1b on a GPU, or tiny with --quick.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Make the (temporary) stores in this directory, to measure its disk.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run only this measurement: {', '.join(MEASUREMENTS)}. May be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Run single measurements; see HELP."""
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
    outcome, results = measure_all(settings, store, progress(as_json), measurements)
    hand_out(outcome, results, as_json=as_json, line=as_json or not model, out=out)


def refuse_options(context: typer.Context) -> None:
    """Refuses an option before the sub-command, which would be ignored silently.

    Raises:
        ValueError: there is one.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(
                f"Give the options after the sub-command: python -m benchmarks {context.invoked_subcommand} ..."
            )


def _chosen(names: list[str] | None, among: Measurements) -> Measurements:
    unknown = sorted(set(names or ()) - set(among))
    if unknown:
        raise ValueError(f"There is no measurement {unknown[0]!r}; choose from {', '.join(among)}.")
    return {name: measure for name, measure in among.items() if not names or name in names}
