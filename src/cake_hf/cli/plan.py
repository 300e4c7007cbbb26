"""`cake-hf plan`: computes the best split, and the time that it takes, from costs. Runs nothing unless asked to measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cake_hf.cli import known_costs
from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.inspect_store import existing_store
from cake_hf.cli.known_costs import CostQuery, KnownCosts
from cake_hf.cli.models import find_device, load_config, load_model, refuse_too_long
from cake_hf.cli.options import Dtype
from cake_hf.cli.plan_codecs import Forms, forms_of
from cake_hf.cli.sheets import Bar, Bars
from cake_hf.errors import CakeError
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.learning import CostLearner
from cake_hf.scheduling.planner import Plan, auto_chunk_size, plan, why_chunk_size
from cake_hf.stores import open_store
from cake_hf.util.redaction import shown_url
from cake_hf.util.sizes import bytes_text, count_text, seconds_text

CURVE_LINES = 35
"""The curve is drawn at no more than this many splits, the best one included."""

MAX_CHUNKS = 100_000
MAX_TOKENS = 2**31
SHORT = 12
"""Digits of a namespace that are shown."""

BITS_PER_BYTE, GIGA, MIB = 8, 10**9, 2**20


def plan_command(
    model: Annotated[str, typer.Option(help="A model's folder or name on the Hub; with --store and --tokens.")] = "",
    store: Annotated[str, typer.Option(help="The store whose notes of the model's costs are used.")] = "",
    tokens: Annotated[
        int | None, typer.Option(help="Length of the prompt, all of whose full chunks are stored.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the costs now, with a few chunks (loads the model).")
    ] = False,
    chunk_size: Annotated[
        int | None,
        typer.Option(help="Tokens per chunk; by default as in the store, or as a cache uses on that device."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the weights, and so of the KV.")] = Dtype.AUTO,
    device: Annotated[str, typer.Option(help="E.g. cpu or cuda:1; auto is the GPU if there is one.")] = "auto",
    chunks: Annotated[int | None, typer.Option(help="Full chunks of the prompt, instead of --tokens.")] = None,
    compute_base: Annotated[float | None, typer.Option(help="Seconds to compute the first chunk.")] = None,
    compute_slope: Annotated[
        float | None,
        typer.Option(help="Additional seconds for each further chunk; 0 if not given."),
    ] = None,
    chunk_mib: Annotated[float | None, typer.Option(help="MiB of KV per chunk, as computed.")] = None,
    gbps: Annotated[float | None, typer.Option(help="Bandwidth of the store in 10^9 bits per second.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds until a load's first byte; 0 if not given.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Concurrent loads; they share the bandwidth and overlap the latency. As measured, or 1."),
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            help="Form of the stored chunks: none, auto, or a codec that is listed; by default as they came last."
        ),
    ] = "",
    max_ttft: Annotated[
        float | None,
        typer.Option(help="Plan with the finest form that a cache with this max_ttft would load; not with --codec."),
    ] = None,
    suffix: Annotated[float, typer.Option(help="Seconds to compute the prompt's suffix.")] = 0.0,
    gpu_share: Annotated[
        float, typer.Option(help="Share of the device's compute that computing chunks gets, above 0 and up to 1.")
    ] = 1.0,
    costs: Annotated[
        Path | None, typer.Option(help="Measured costs, as written by CostLearner.to_json; options override them.")
    ] = None,
) -> None:
    """Predict the time to first token of computing, loading and both, and where the two ends meet.

    From the costs in a store's notes: cake-hf plan --model DIR --store DIR --tokens 8192. All other options override
    these.
    """
    if not 0 < gpu_share <= 1:
        raise ValueError(f"--gpu-share must be above 0 and at most 1, got {gpu_share}.")
    if max_ttft is not None and (codec or not max_ttft > 0):
        raise ValueError("--max-ttft must be positive, and chooses the form; leave out --codec.")
    if tokens is not None:
        _refuse_outside("--tokens", tokens, 1, MAX_TOKENS)
    if chunk_size is not None:
        _refuse_outside("--chunk-size", chunk_size, MIN_CHUNK_SIZE, MAX_TOKENS)
    if costs is not None and (model or store):
        raise ValueError("--costs brings costs of its own; leave out --model and --store.")
    known, measured = None, Costs()
    if model or store:
        if not (model and store and (tokens or chunks)):
            raise ValueError("Give --model, --store and --tokens together; or --chunks and the costs themselves.")
        wanted = CostQuery(model, load_config(model), str(find_device(device)), chunk_size, dtype.value)
        known = find_costs(wanted, store, tokens, chunks, measure=measure)
        measured = known.costs if known else measured
        _refuse_unknown(
            wanted,
            store,
            computing=measured.compute is None and compute_base is None,
            loading=measured.load is None and None in (chunk_mib, gbps),
        )
    elif measure:
        raise ValueError("--measure needs to know what to measure: give --model, --store and --tokens.")
    elif costs is not None:
        measured = read_costs(costs)
    kind = find_device(device).type if model else ""  # plain numbers do not need torch
    size = known.chunk_size if known else chunk_size or auto_chunk_size(kind)
    count = _chunk_count(tokens, chunks, size)
    compute = _compute_cost(measured.compute, compute_base, compute_slope, gpu_share)
    forms = _forms(measured, known, chunk_mib, gbps, latency_ms, threads)
    chosen, kept = forms.choose(codec), ""
    if max_ttft is not None:
        chosen, in_time = forms.in_time(compute, count, suffix, max_ttft)
        kept = f"; {'the finest' if in_time else 'yet not'} within {seconds_text(max_ttft)}"
    load = forms.load(chosen)
    made = plan(Costs(compute, load), [True] * count, suffix_seconds=suffix)
    by_form = forms.bars(compute, count, suffix, chosen) if len(forms.codecs) > 1 else []
    show_plan(compute, load, made, _source(known, store), _sized(size, kind), forms.text(chosen) + kept, by_form)


def find_costs(
    wanted: CostQuery, store: str, tokens: int | None, chunks: int | None, *, measure: bool
) -> KnownCosts | None:
    """Returns costs from the store's notes, or measured now.

    Raises:
        CakeError: there is no such store, or costs cannot be measured.
        ValueError: the prompt is too long or too short for the model.
    """
    if tokens is not None:
        refuse_too_long(wanted.config, tokens, "give fewer --tokens.")
    if measure:
        size = wanted.chunk_size or auto_chunk_size(find_device(wanted.device).type)
        count = _chunk_count(tokens, chunks, size)
        with console.status("loading the model"):
            loaded = load_model(wanted.model, wanted.dtype, wanted.device)
        with open_store(store) as opened, console.status("computing and loading a few chunks"):
            return known_costs.measure(loaded, opened, size, count)
    with existing_store(store) as opened, progress_bar("reading headers", "chunks") as progress:
        return known_costs.remembered(opened, wanted, progress)


def _refuse_unknown(wanted: CostQuery, store: str, *, computing: bool, loading: bool) -> None:
    missing = {"computing": computing, "loading": loading}
    if any(missing.values()):
        what = " and ".join(name for name, is_missing in missing.items() if is_missing)
        raise CakeError(
            f"What {what} costs with {wanted.model} is not known in the store {shown_url(store)}. It is learned "
            "from prompts; or measure it now with --measure, or give --compute-base, and --chunk-mib with --gbps."
        )


def read_costs(path: Path) -> Costs:
    """Reads costs from a file written with `CostLearner.to_json`.

    Raises:
        CakeError: it cannot be read, or holds something else.
    """
    try:
        learner = CostLearner.from_json(path.read_text(encoding="utf-8"), time.time())
    except (OSError, UnicodeDecodeError) as error:
        raise CakeError(f"The costs in {path} cannot be read: {error}") from error
    if learner is None:
        raise CakeError(f"{path} does not hold measured costs; write CostLearner.to_json(time.time()) to it.")
    return learner.costs()


def show_plan(
    compute: ComputeCost,
    load: LoadCost,
    made: Plan,
    source: str = "",
    sized: str = "",
    codec: str = "",
    by_form: Sequence[Bar] = (),
) -> None:
    """Shows the decision, the assumptions, the three predictions, and the curve."""
    seconds, split = made.predicted_seconds, made.split
    if seconds is None or split is None:
        raise ValueError("A plan from unknown costs has nothing to show.")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("decision", _decision_text(made, split))
    grid.add_row("split", f"{split} of {count_text(len(made.curve) - 1, 'chunk')} computed")
    grid.add_row("computing", f"{_ms(compute.base)} + {_ms(compute.slope)} per chunk before it")
    grid.add_row("loading", f"{bytes_text(load.chunk_bytes)} every {_ms(load.interval)}")
    if codec:
        grid.add_row("codec", codec)
    if sized:
        grid.add_row("chunks", sized)
    if source:
        grid.add_row("costs", Text(source))
    grid.add_row("gain", f"{made.gain:.2f}x over the better of the two alone")
    console.print(grid)
    console.print("\npredicted time to first token", style="bold")
    console.print(
        Bars(
            [
                Bar("compute only", made.curve[-1], "dark_orange"),
                Bar("load only", made.curve[0], "dodger_blue3"),
                Bar("both ends", seconds, "green", f"{made.gain:.2f}x"),
            ]
        )
    )
    if by_form:
        console.print("\n... of both ends, by the form of the chunks", style="bold")
        console.print(Bars(by_form))
    console.print("\n... by how many chunks are computed", style="bold")
    console.print(Bars([_curve_bar(made.curve, m, split) for m in shown_splits(len(made.curve), split)]))


def shown_splits(points: int, best: int) -> list[int]:
    """Returns at most CURVE_LINES of the splits 0..points-1, evenly spaced, with both ends and the best one."""
    step = max(1, -(-points // (CURVE_LINES - 2)))
    return sorted({*range(0, points, step), best, points - 1})


def _curve_bar(curve: Sequence[float], m: int, best: int) -> Bar:
    if m == best:
        return Bar(str(m), curve[m], "green", "best")
    return Bar(str(m), curve[m], "dodger_blue3" if m < best else "dark_orange")


def _decision_text(made: Plan, split: int) -> str:
    last = len(made.curve) - 2
    if made.decision == "compute":
        return "compute: load nothing"
    if made.decision == "load":
        return "load: compute nothing before the suffix"
    return f"both: compute {_chunk_range(0, split - 1)}, load {_chunk_range(split, last)}"


def _chunk_range(first: int, last: int) -> str:
    return f"chunk {first}" if first == last else f"chunks {first}-{last}"


def _chunk_count(tokens: int | None, chunks: int | None, chunk_size: int) -> int:
    """Returns how many full chunks are restored: `generate` needs at least one more token to run."""
    if chunks is None and tokens is None:
        raise ValueError("Give --tokens or --chunks: how long the prompt is.")
    count = chunks if chunks is not None else (tokens or 0) - 1
    if chunks is None:
        count //= chunk_size
        if count < 1:
            raise ValueError(
                f"{tokens} tokens are less than one chunk of {chunk_size} and a token after it; nothing is stored."
            )
    _refuse_outside("--chunks", count, 1, MAX_CHUNKS)
    return count


def _refuse_outside(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{option} must be from {low:,} to {high:,}, got {value:,}.")


def _sized(size: int, kind: str) -> str:
    """Returns the size of a chunk, and that of a cache with default settings."""
    if not kind:
        return ""
    return (
        why_chunk_size(kind)
        if size == auto_chunk_size(kind)
        else f"{size} tokens; the default of a cache is {why_chunk_size(kind)}"
    )


def _source(known: KnownCosts | None, store: str) -> str:
    if known is None:
        return ""
    return f"of namespace {known.namespace[:SHORT]} in {shown_url(store)}: {known.dtype}, chunks of {known.chunk_size} tokens"


def _compute_cost(measured: ComputeCost | None, base: float | None, slope: float | None, share: float) -> ComputeCost:
    base = _given("--compute-base", base, measured.base if measured else None)
    slope = _given("--compute-slope", slope, measured.slope if measured else 0.0)
    ComputeCost(base, slope)  # an error names the value as given, not as changed by the share
    return ComputeCost(base / share, slope / share)


def _forms(measured: Costs, known: KnownCosts | None, *given: Any) -> Forms:
    """Returns what loading costs in each form; `given` are the options for raw chunks."""
    load, codec = measured.load, measured.codec
    raw = codec.raw(load) if codec and load else load
    return forms_of(_load_cost(raw, *given), codec, known.dtype if known else "", came_encoded=measured.come_encoded)


def _load_cost(
    measured: LoadCost | None,
    chunk_mib: float | None,
    gbps: float | None,
    latency_ms: float | None,
    threads: int | None,
) -> LoadCost:
    given_bytes = None if chunk_mib is None else chunk_mib * MIB
    given_bandwidth = None if gbps is None else gbps * GIGA / BITS_PER_BYTE
    given_latency = None if latency_ms is None else latency_ms / 1e3
    return LoadCost(
        latency=_given("--latency-ms", given_latency, measured.latency if measured else 0.0),
        bandwidth=_given("--gbps", given_bandwidth, measured.bandwidth if measured else None),
        chunk_bytes=_given("--chunk-mib", given_bytes, measured.chunk_bytes if measured else None),
        threads=threads if threads is not None else measured.threads if measured else 1,
    )


def _given(option: str, value: float | None, measured: float | None) -> float:
    if value is not None:
        return value
    if measured is None:
        raise ValueError(f"Give {option}, or measured costs that know it with --costs.")
    return measured


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else seconds_text(seconds)
