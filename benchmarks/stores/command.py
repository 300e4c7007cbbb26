"""`python -m benchmarks stores`: options in, a table for people and one line of JSON out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.figures import Result
from benchmarks.machine import Machine, disturbance
from benchmarks.servers import Unavailable
from benchmarks.stores import contenders, own_cluster, remote
from benchmarks.stores.race import race
from benchmarks.stores.values import StoreSettings, Values
from benchmarks.table import build_tables
from cake_hf.cli.console import WRONG, console, errors
from cake_hf.errors import CakeError
from cake_hf.util.redaction import shown

STORES_HELP = (
    "Measure each store's speed as a share of its client's raw speed; 0.8 or more is the goal.\n\n"
    "Servers that are installed are started on loopback: redis-server, moto for S3, a Hub, a Mooncake cluster in a "
    "network of its own. With --redis, --s3 or --mooncake yours is measured instead: what is written there is removed again. "
    "Stores that are missing here are named with the reason.\n\n"
    "Goals never decide the exit code; it is 1 only if a store returned other bytes than it was given, or failed."
)

NAMES = ("local", "memory", "redis", "s3", "mooncake", "pack", "hub", "tiers")

QUICK = StoreSettings(chunks=3, layers=2, tokens=64, repeats=2)

Measure = Callable[[], Result]


def stores_command(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure only this store: {', '.join(NAMES)}. May be repeated.")
    ] = None,
    redis: Annotated[str, typer.Option(help="A server of yours, such as redis://host:6379/0.")] = "",
    s3: Annotated[str, typer.Option(help="A bucket of yours, such as s3://bucket/prefix (or gs://, az://).")] = "",
    mooncake: Annotated[str, typer.Option(help="A cluster of yours, such as mooncake://master:50051/prefix.")] = "",
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks read in a round; 16.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of a chunk, of 1 MiB each; 16.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="The most concurrent readers; 2.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Number of rounds; 7, or 2 with --quick.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use little data and two rounds, only to see that it runs.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Make the (temporary) directories in this one, to measure its disk.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the line of JSON.")] = False,
) -> None:
    """Measure the stores; see STORES_HELP."""
    given = {"chunks": chunks, "layers": layers, "threads": threads, "repeats": repeats}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = StoreSettings(**{**(QUICK if quick else StoreSettings()).__dict__, **chosen})
    if unknown := sorted(set(only or ()) - set(NAMES)):
        raise ValueError(f"There is no store {unknown[0]!r} to be measured; choose from {', '.join(NAMES)}.")
    names = [name for name in NAMES if not only or name in only]
    urls = {"redis": redis, "s3": s3, "mooncake": mooncake}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    tell = (lambda line: None) if as_json else (lambda line: errors.print(line, style="dim"))
    with tempfile.TemporaryDirectory(prefix="cake-bench-", dir=folder) as base:
        outcome, results = measure_all(measures(settings, Path(base), urls, names), tell)
    outcome |= {"settings": settings.as_dict()}
    if not as_json:
        console.print(build_tables(results))
        if told := disturbance(outcome["machine"]):
            console.print(told, style="yellow")
        for name, reason in outcome["left_out"].items():
            console.print(f"{name} was left out: {reason}", style="yellow")
    line = json.dumps(outcome)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    typer.echo(line)
    if outcome["failures"]:
        errors.print(*outcome["failures"], sep="\n", style="bold red")
        raise typer.Exit(WRONG)


def measures(settings: StoreSettings, folder: Path, urls: Mapping[str, str], names: list[str]) -> dict[str, Measure]:
    """Returns the measurement of each of these stores. The values are made once, when the first one needs them."""
    shared: list[Values] = []

    def values() -> Values:
        if not shared:
            shared.append(Values(settings))
        return shared[0]

    def run(make: Callable[..., Any], **options: str) -> Result:
        with make(values(), settings, folder, **options) as contender:
            return race(contender, values(), settings)

    ways: dict[str, Measure] = {
        "local": partial(run, contenders.local),
        "memory": partial(run, contenders.memory),
        "redis": partial(run, remote.redis, url=urls["redis"]),
        "s3": partial(run, remote.s3, url=urls["s3"]),
        "mooncake": partial(run, remote.mooncake, url=urls["mooncake"])
        if urls["mooncake"]
        else partial(own_cluster.measure, settings),
        "pack": partial(run, contenders.pack),
        "hub": partial(run, remote.hub),
        "tiers": partial(run, contenders.tiers),
    }
    return {name: ways[name] for name in names}


def measure_all(ways: Mapping[str, Measure], tell: Callable[[str], None]) -> tuple[dict[str, Any], list[Result]]:
    """Measures one store after the other; failures and missing stores are reported, and the rest counts.

    Returns:
        Everything but the settings, JSON-ready; and the results for a table.
    """
    begin, machine = time.perf_counter(), Machine()
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    for name, measure in ways.items():
        tell(f"measuring {name} ...")
        try:
            results[name] = measure()
        except Unavailable as error:
            left_out[name] = shown(error)
        except CakeError as error:
            results[name] = Result(name, {}, failure=shown(error))
    outcome = {
        "machine": machine.as_dict(),
        "results": {name: result.as_dict() for name, result in results.items()},
        "left_out": left_out,
        "failures": [f"{name}: {result.failure}" for name, result in results.items() if result.failure],
        "seconds": time.perf_counter() - begin,
    }
    return outcome, list(results.values())
