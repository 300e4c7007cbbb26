"""`cake-hf plan`: costs in, the best split and what it will take out. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cake_hf.arithmetic.costs import ComputeCost, CostLearner, Costs, LoadCost
from cake_hf.arithmetic.errors import CakeError
from cake_hf.arithmetic.planner import Plan, plan
from cake_hf.people.console import console
from cake_hf.people.tables import Bar, Bars
from cake_hf.people.units import bytes_text, count_text, seconds_text

CURVE_LINES = 35
"""The curve is drawn at so many splits at most, and always at the best one."""

BITS_PER_BYTE, GIGA, MIB = 8, 10**9, 2**20


def plan_command(
    chunks: Annotated[int, typer.Option(min=1, max=100_000, help="Full chunks of the prompt, all of them stored.")],
    compute_base: Annotated[float | None, typer.Option(help="Seconds to compute the first chunk.")] = None,
    compute_slope: Annotated[
        float | None,
        typer.Option(help="Seconds that each further chunk costs more than the one before; 0 if not given."),
    ] = None,
    chunk_mib: Annotated[float | None, typer.Option(help="MiB of KV per chunk.")] = None,
    gbps: Annotated[float | None, typer.Option(help="Bandwidth of the store in 10^9 bits per second.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds until a load's first byte; 0 if not given.")
    ] = None,
    threads: Annotated[
        int, typer.Option(help="Loads at a time; they share the bandwidth and overlap the latency.")
    ] = 1,
    suffix: Annotated[float, typer.Option(help="Seconds to compute the prompt's last piece.")] = 0.0,
    gpu_share: Annotated[
        float, typer.Option(help="Part of the device's compute, above 0 to 1, that computing chunks gets.")
    ] = 1.0,
    costs: Annotated[
        Path | None, typer.Option(help="Measured costs, as written by CostLearner.to_json; options override them.")
    ] = None,
) -> None:
    """Predict the time to first token of computing, loading and both, and where the two ends meet."""
    if not 0 < gpu_share <= 1:
        raise ValueError(f"--gpu-share must be above 0 and at most 1, got {gpu_share}.")
    measured = Costs() if costs is None else read_costs(costs)
    compute = _compute_cost(measured.compute, compute_base, compute_slope, gpu_share)
    load = _load_cost(measured.load, chunk_mib, gbps, latency_ms, threads)
    show_plan(compute, load, plan(Costs(compute, load), [True] * chunks, suffix_seconds=suffix))


def read_costs(path: Path) -> Costs:
    """Costs from a file that has what `CostLearner.to_json` gave.

    Raises:
        CakeError: it cannot be read, or holds something else.
    """
    try:
        learner = CostLearner.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CakeError(f"The costs in {path} cannot be read: {error}") from error
    if learner is None:
        raise CakeError(f"{path} does not hold measured costs; write CostLearner.to_json() to it.")
    return learner.costs()


def show_plan(compute: ComputeCost, load: LoadCost, made: Plan) -> None:
    """The decision, what was assumed, the three predictions, and the curve.

    Args:
        compute, load: the costs.
        made: a plan of at least one chunk from them.
    """
    seconds, split = made.predicted_seconds, made.split
    if seconds is None or split is None:
        raise ValueError("A plan from unknown costs has nothing to show.")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row("decision", _decision_text(made, split))
    facts.add_row("split", f"{split} of {count_text(len(made.curve) - 1, 'chunk')} computed")
    facts.add_row("computing", f"{_ms(compute.base)} + {_ms(compute.slope)} per chunk before it")
    facts.add_row("loading", f"{bytes_text(load.chunk_bytes)} every {_ms(load.interval)}")
    facts.add_row("gain", f"{made.gain:.2f}x over the better of the two alone")
    console.print(facts)
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
    console.print("\n... by how many chunks are computed", style="bold")
    console.print(Bars([_curve_bar(made.curve, m, split) for m in shown_splits(len(made.curve), split)]))


def shown_splits(points: int, best: int) -> list[int]:
    """At most CURVE_LINES of the splits 0..points-1, evenly spaced, with both ends and the best one."""
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
        return "load: compute nothing before the last piece"
    return f"both: compute {_chunk_range(0, split - 1)}, load {_chunk_range(split, last)}"


def _chunk_range(first: int, last: int) -> str:
    return f"chunk {first}" if first == last else f"chunks {first}-{last}"


def _compute_cost(measured: ComputeCost | None, base: float | None, slope: float | None, share: float) -> ComputeCost:
    base = _given("--compute-base", base, measured.base if measured else None)
    slope = _given("--compute-slope", slope, measured.slope if measured else 0.0)
    ComputeCost(base, slope)  # complains of what was given, not of what the share makes of it
    return ComputeCost(base / share, slope / share)


def _load_cost(
    measured: LoadCost | None, chunk_mib: float | None, gbps: float | None, latency_ms: float | None, threads: int
) -> LoadCost:
    given_bytes = None if chunk_mib is None else chunk_mib * MIB
    given_bandwidth = None if gbps is None else gbps * GIGA / BITS_PER_BYTE
    given_latency = None if latency_ms is None else latency_ms / 1e3
    return LoadCost(
        latency=_given("--latency-ms", given_latency, measured.latency if measured else 0.0),
        bandwidth=_given("--gbps", given_bandwidth, measured.bandwidth if measured else None),
        chunk_bytes=_given("--chunk-mib", given_bytes, measured.chunk_bytes if measured else None),
        threads=threads,
    )


def _given(option: str, value: float | None, measured: float | None) -> float:
    if value is not None:
        return value
    if measured is None:
        raise ValueError(f"Give {option}, or measured costs that know it with --costs.")
    return measured


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else seconds_text(seconds)
