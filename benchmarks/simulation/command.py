"""`python -m benchmarks simulate`: the library's own frontier and planner on a virtual clock, beside what the paper reports.

The paper gives step times for one model on two GPUs, so the others are scaled from these, by the stated `ASSUMPTIONS`:

- Chunk i of 512 tokens takes `a + b * i` on one GPU. Of LongAlpaca-7B: A100 38.8 to 112.0 ms over chunks 0 to 63, H100 27.4
  to 93.5 ms (read off a plot of Jin et al., ICML 2025).
- a is the work of the weights: it grows with the parameters outside the embeddings.
- b is the work of attention: it grows with layers times hidden size. (Sharing K and V between heads does not lessen it.)
- Twice the GPUs are 1.64 times as fast. That number is fitted, to 13B's compute-only time on two A100 (Tl over the
  published speedups: 2.03 s). All other published numbers are left to be met or missed.
- A share of the device divides all compute times by it, and the prompt's last piece takes no time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from types import ModuleType
from typing import Annotated, Any

import typer

from benchmarks.simulation import beliefs as believing
from benchmarks.simulation import changes as changing
from benchmarks.simulation import codecs as encoding
from benchmarks.simulation.simulator import Cell, Setting, evaluate, simulate, steps
from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.sheets import Sheet
from cake_hf.scheduling.costs import ComputeCost
from cake_hf.util.sizes import seconds_text

BITS_PER_BYTE, GIGA, KIB = 8, 10**9, 2**10

CURVE_CHUNK = 512
"""Tokens of the chunks that the step times are for."""

GPU_STEPS = {"A100": (0.0388, 0.1120), "H100": (0.0274, 0.0935)}
"""Seconds of 7B's chunk 0 and of its chunk 63."""

LAST_MEASURED = 63

DOUBLING = 1.64
"""The speed of twice the GPUs, relative to one set."""

ASSUMPTIONS = (
    "Assumed: 7B's published step times (A100 38.8 to 112.0 ms, H100 27.4 to 93.5 ms over 64 chunks); for other models "
    "the base scales with the weights, the slope with layers x hidden size; twice the GPUs are 1.64x as fast (fitted to "
    "13B on 2xA100); 2xA100 where the paper's table names no GPU; nothing but computing and loading takes time."
)


@dataclass(frozen=True)
class Model:
    """The numbers of a model that decide its costs.

    Attributes:
        name: short.
        weights: parameters outside the embeddings, in 10^9.
        layers: of it.
        width: hidden size.
        kv_kib: KiB of KV per token, in bfloat16.
    """

    name: str
    weights: float
    layers: int
    width: int
    kv_kib: float


SEVEN = Model("7B", 6.48, 32, 4096, 512)
THIRTEEN = Model("13B", 12.69, 40, 5120, 800)
EIGHT = Model("8B", 6.98, 32, 4096, 128)
SEVENTY = Model("70B", 68.5, 80, 8192, 320)


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        model, gpu, gpus: what computes.
        gbps: of the line, 10^9 bits per second.
        tokens: of the prompt.
        share: of the device.
        bits: per number of KV at rest; 16 is as computed.
        published: speedups over load-only and over compute-only; None for what is not reported.
    """

    model: Model
    gpu: str
    gpus: int
    gbps: float
    tokens: int = 16 * KIB
    share: float = 1.0
    bits: int = 16
    published: tuple[float | None, float | None] | None = None

    @property
    def name(self) -> str:
        bits = "" if self.bits == 16 else f" {self.bits}-bit"
        share = "" if self.share == 1 else f" {self.share:.1%}"
        gpu = self.gpu if self.gpus == 1 else f"{self.gpus}x{self.gpu}"
        return f"{self.model.name} {gpu} {_tokens_text(self.tokens)} {self.gbps:g}G{share}{bits}"


PAPER = (
    Case(THIRTEEN, "A100", 2, 32, published=(2.63, 1.59)),
    Case(THIRTEEN, "H100", 1, 32, published=(2.40, 1.75)),
    Case(THIRTEEN, "A100", 1, 32, published=(2.00, 1.91)),
    Case(SEVEN, "A100", 1, 32, published=(2.20, 1.94)),
    Case(EIGHT, "A100", 2, 32, published=(1.37, 3.18)),
    Case(THIRTEEN, "A100", 2, 32, 4 * KIB, published=(2.67, 1.25)),
    Case(THIRTEEN, "A100", 2, 32, bits=8, published=(1.85, 2.12)),
    Case(THIRTEEN, "A100", 2, 32, bits=3, published=(1.37, 3.73)),
    Case(SEVENTY, "A100", 2, 32, share=0.125, published=(0.80, None)),
    Case(EIGHT, "A100", 2, 32, share=0.125, published=(0.98, None)),
    Case(THIRTEEN, "A100", 2, 7, 4 * KIB, published=(None, 0.99)),
)
"""The cells of the paper that give a speedup; the last three are the ones it loses. (Left out: the average over all cells,
and the cell with other requests beside it, which is about throughput.)"""

QUANTISED = (PAPER[0], *(case for case in PAPER if case.bits != 16))

BEYOND = tuple(
    Case(SEVENTY, "H100", 8, gbps, tokens * KIB) for tokens in (128, 512, 1024) for gbps in (7, 32, 100, 400)
)
"""Settings that no machine at hand can run."""

TITLES = {
    "paper": "The paper's cells",
    "beyond": "Beyond what can be run here",
    "own": "Your setting",
}

NEVER_SLOWER = 1.02
"""The library's promise: at most this many times the better single method."""

LEGEND = (
    r"Speedups are over load-only\over compute-only: as the paper reports them, of its policy as simulated (Cake), and ours. "
    "T* is the least time of any split, eta = T*/T, sigma = T/Tc + T/Tl, ratio = T over the better single method (! above "
    "1.02); first: that ratio for the first prompt ever, when no costs are known."
)


@dataclass(frozen=True)
class Own:
    """A setting as the options describe it. Step times that are not given are 7B's on one A100."""

    bandwidth_gbps: float = 32.0
    tokens: int = 16 * KIB
    chunk: int = CURVE_CHUNK
    kv_kib_per_token: float = SEVEN.kv_kib
    base_ms: float | None = None
    slope_ms: float | None = None
    layers: int = SEVEN.layers
    gpu_share: float = 1.0
    codec: str = "none"
    cores: int = 0


def simulate_command(
    context: typer.Context,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="Simulate the paper's cells and some beyond; also the default without any setting."
        ),
    ] = False,
    changes: Annotated[
        bool, typer.Option("--changes", help="Simulate a machine that changes, and wrong beliefs (takes a minute).")
    ] = False,
    beliefs: Annotated[
        bool,
        typer.Option("--beliefs", help="Simulate known, wrong and unknown costs in 168 settings (takes a minute)."),
    ] = False,
    codecs: Annotated[
        bool, typer.Option("--codecs", help="Simulate encoded chunks, and loads that choose a form to keep a time.")
    ] = False,
    bandwidth_gbps: Annotated[
        float, typer.Option(help="Bandwidth of the line, in 10^9 bits per second.")
    ] = Own.bandwidth_gbps,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = Own.tokens,
    chunk: Annotated[int, typer.Option(help="Tokens per chunk.")] = Own.chunk,
    kv_kib_per_token: Annotated[float, typer.Option(help="KiB of KV per token.")] = Own.kv_kib_per_token,
    base_ms: Annotated[
        float | None, typer.Option(help="Milliseconds to compute the first chunk; by default as 7B on an A100.")
    ] = None,
    slope_ms: Annotated[
        float | None, typer.Option(help="Additional milliseconds for each further chunk; by default as 7B on an A100.")
    ] = None,
    layers: Annotated[
        int, typer.Option(help="Layers of the model; a forward can be preempted between two.")
    ] = Own.layers,
    gpu_share: Annotated[float, typer.Option(help="Share of the device, above 0 to 1.")] = Own.gpu_share,
    codec: Annotated[
        str,
        typer.Option(help=f"Form of the chunks: {', '.join(encoding.FORMS)}; with typical sizes and decode speeds."),
    ] = Own.codec,
    cores: Annotated[
        int, typer.Option(help="Cores on which chunks are computed and decoded; 0 if computing has its own device.")
    ] = Own.cores,
    threads: Annotated[int, typer.Option(help="Loader threads.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Simulate restores with the library's own decisions: the paper's cells, or one setting of yours."""
    given = [field.name for field in fields(Own) if _was_given(context, field.name)]
    if paper and given:
        raise ValueError(f"--paper has settings of its own; leave out {_options_text(given)}.")
    others = [*given, *(["paper"] if paper else [])]
    if codecs:
        others = [*others, *(["beliefs"] if beliefs else []), *(["changes"] if changes else [])]
        _show_codecs(threads, as_json=as_json, others=others)
        return
    if beliefs:
        others = [*others, *(["changes"] if changes else [])]
        _show_grid("beliefs", believing, "beliefs", len(believing.BELIEFS), as_json=as_json, others=others)
        return
    if changes:
        _show_grid("changes", changing, "kinds of change", len(changing.CHANGES), as_json=as_json, others=others)
        return
    if given:
        own = Own(bandwidth_gbps, tokens, chunk, kv_kib_per_token, base_ms, slope_ms, layers, gpu_share, codec, cores)
        results = {"own": [_row("your setting", own_setting(own, threads))]}
    else:
        parts = {"paper": PAPER, "beyond": BEYOND}
        results = {part: [_row(c.name, setting_of(c, threads), c.published) for c in parts[part]] for part in parts}
    for part, rows in results.items():
        console.print(_table(TITLES[part], rows))
        console.print()
    console.print(LEGEND if given else f"{LEGEND} {ASSUMPTIONS}", style="dim")
    if as_json:
        plain = {part: [row.plain() for row in rows] for part, rows in results.items()}
        console.print(json.dumps({"threads": threads, **plain}), soft_wrap=True)


def _show_grid(option: str, grid: ModuleType, kinds: str, number: int, *, as_json: bool, others: Sequence[str]) -> None:
    """Simulates the settings of a module, and shows its table.

    Args:
        option: that asks for it; also its name in the JSON.
        grid: has `settings`, `table`, `sheet` and `LEGEND`.
        kinds: what is counted while it runs.
        number: how many of these there are.
        as_json: also print JSON.
        others: options for a single setting that were given, too.
    """
    if others:
        raise ValueError(f"--{option} has settings of its own; leave out {_options_text(others)}.")
    with progress_bar("simulating", kinds) as progress:
        progress(0, number)
        done = count(1)
        rows = grid.table(list(grid.settings()), lambda: progress(next(done), number))
    console.print(grid.sheet(rows))
    console.print()
    console.print(grid.LEGEND, style="dim")
    if as_json:
        console.print(json.dumps({option: [row.plain() for row in rows]}), soft_wrap=True)


def _show_codecs(threads: int, *, as_json: bool, others: Sequence[str]) -> None:
    """Simulates encoded chunks, and shows the tables: first the paper's KV of 16, 8 and 3 bits."""
    if others:
        raise ValueError(f"--codecs has settings of its own; leave out {_options_text(others)}.")
    rows = [_row(case.name, setting_of(case, threads), case.published) for case in QUANTISED]
    console.print(_table("The paper's KV of 16, 8 and 3 bits", rows))
    console.print()
    told: dict[str, Any] = {"paper": [row.plain() for row in rows]}
    for table in encoding.tables(threads):
        console.print(table.sheet)
        console.print()
        told[table.name] = [row.plain for row in table.rows]
    console.print(f"{LEGEND} {encoding.LEGEND} {ASSUMPTIONS}", style="dim")
    if as_json:
        console.print(json.dumps({"threads": threads, **told}), soft_wrap=True)


def step_cost(model: Model, gpu: str, gpus: int) -> ComputeCost:
    """Returns the seconds of a chunk of 512 tokens by the assumptions above."""
    first, last = GPU_STEPS[gpu]
    speed = DOUBLING ** math.log2(gpus)
    base = first * model.weights / SEVEN.weights
    slope = (last - first) / LAST_MEASURED * model.layers * model.width / (SEVEN.layers * SEVEN.width)
    return ComputeCost(base / speed, slope / speed)


def setting_of(case: Case, threads: int) -> Setting:
    """Returns the setting of a row."""
    cost = step_cost(case.model, case.gpu, case.gpus)
    return Setting(
        compute=steps(case.tokens // CURVE_CHUNK, cost.base, cost.slope),
        chunk_bytes=CURVE_CHUNK * case.model.kv_kib * KIB * case.bits / 16,
        bandwidth=case.gbps * GIGA / BITS_PER_BYTE,
        threads=threads,
        layers=case.model.layers,
        gpu_share=case.share,
    )


def own_setting(own: Own, threads: int) -> Setting:
    """Returns the setting that the options describe.

    Step times that are not given are scaled to the size of the chunks: the weights' work grows with their tokens, that of
    attention with their square.

    Raises:
        ValueError: a value is out of range.
    """
    if own.chunk < 1 or own.tokens < own.chunk:
        raise ValueError(f"A prompt must have at least one chunk, got {own.tokens} tokens in chunks of {own.chunk}.")
    if own.codec not in encoding.FORMS:
        raise ValueError(f"codec {own.codec!r} is unknown; choose one of {', '.join(encoding.FORMS)}.")
    usual, size = step_cost(SEVEN, "A100", 1), own.chunk / CURVE_CHUNK
    cost = ComputeCost(
        usual.base * size if own.base_ms is None else own.base_ms / 1e3,
        usual.slope * size**2 if own.slope_ms is None else own.slope_ms / 1e3,
    )
    return Setting(
        compute=steps(own.tokens // own.chunk, cost.base, cost.slope),
        chunk_bytes=own.chunk * own.kv_kib_per_token * KIB,
        bandwidth=own.bandwidth_gbps * GIGA / BITS_PER_BYTE,
        threads=threads,
        layers=own.layers,
        gpu_share=own.gpu_share,
        codec=None if own.codec == "none" else encoding.FORMS[own.codec],
        cores=own.cores,
    )


@dataclass(frozen=True)
class _Row:
    """A simulated setting with known costs; its ratio as the first prompt ever; and the paper's numbers."""

    name: str
    cell: Cell
    first_ratio: float
    published: tuple[float | None, float | None] | None

    def cells(self, *, with_published: bool) -> list[str]:
        cell = self.cell
        published = [_speedups(*self.published) if self.published else "-"] if with_published else []
        return [
            self.name,
            *published,
            _speedups(cell.load / cell.cake, cell.compute / cell.cake),
            _speedups(cell.load / cell.both, cell.compute / cell.both),
            seconds_text(cell.best),
            f"{cell.eta:.2f}",
            f"{cell.sigma:.2f}",
            _ratio_text(cell.ratio),
            _ratio_text(self.first_ratio),
        ]

    def plain(self) -> dict[str, Any]:
        """Returns all numbers, unrounded; times in seconds."""
        cell = self.cell
        return {
            "cell": self.name,
            "published_over_load": self.published[0] if self.published else None,
            "published_over_compute": self.published[1] if self.published else None,
            "both": cell.both,
            "compute": cell.compute,
            "load": cell.load,
            "cake": cell.cake,
            "best": cell.best,
            "eta": cell.eta,
            "sigma": cell.sigma,
            "ratio": cell.ratio,
            "ratio_first_prompt": self.first_ratio,
            "chunks_computed": cell.outcome.computed,
            "chunks_loaded": cell.outcome.loaded,
            "chunks_left": cell.outcome.left,
        }


def _row(name: str, setting: Setting, published: tuple[float | None, float | None] | None = None) -> _Row:
    cell = evaluate(setting)
    first = simulate(replace(setting, costs_known=False), "both").seconds
    return _Row(name, cell, first / min(cell.compute, cell.load), published)


def _table(title: str, rows: Sequence[_Row]) -> Sheet:
    with_published = any(row.published for row in rows)
    names = ["paper"] if with_published else []
    headings = ("<cell", *names, "Cake", "ours", "T*", "eta", "sigma", "ratio", "first")
    return Sheet(title, headings, [row.cells(with_published=with_published) for row in rows])


def _speedups(over_load: float | None, over_compute: float | None) -> str:
    return "\\".join("-" if value is None else f"{value:.2f}" for value in (over_load, over_compute))


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}{'!' if ratio > NEVER_SLOWER else ''}"


def _tokens_text(tokens: int) -> str:
    return f"{tokens // KIB**2}M" if tokens % KIB**2 == 0 else f"{tokens // KIB}K"


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _options_text(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
