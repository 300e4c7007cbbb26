"""Plots the trace of `python -m benchmarks adapt` from its JSON alone: beliefs beside the time that each chunk took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cake_hf.errors import CakeError
from cake_hf.plots import BOTH, COMPUTE, LIMIT, LOAD, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plain = dict[str, Any]

DPI = 150
WIDTH, HEIGHT = 6.2, 7.2
"""Size of a column in inches."""

SHADES = {"beside a load": ("#d9d9d9", "a competing load"), "slow": ("#d3e5f2", "a tenth of the bandwidth")}
"""Phase -> colour, and its meaning."""
LEFT = "#8a8f98"


@dataclass(frozen=True)
class _Column:
    """One cache's prompts, in order.

    Attributes:
        title: above the column.
        result: the one with the trace.
        caches: those whose prompts are shown, one after the other.
        others: those that they are compared with, in the same phases.
    """

    title: str
    result: str
    caches: tuple[str, ...]
    others: tuple[str, ...]


COLUMNS = (
    _Column("A competing load that passes", "load", ("kept",), ("quiet only",)),
    _Column("The same, then a new store object with the note", "load", ("kept", "note"), ("quiet only",)),
    _Column("A bandwidth that falls, and comes back", "bandwidth", ("changing",), ("slow only", "fast only")),
)


def draw(outcome: Plain, path: Path) -> Path:
    """Plots the first turn of each case.

    Args:
        outcome: the command's JSON.
        path: of the PNG.

    Raises:
        CakeError: matplotlib is not installed, or nothing was measured.
    """
    results = {name: result for name, result in outcome["results"].items() if result["details"].get("trace")}
    columns = [column for column in COLUMNS if column.result in results]
    if not columns:
        raise CakeError("There is nothing to be drawn: no case could be measured.")
    figure = new_figure(WIDTH * len(columns), HEIGHT)
    panels = figure.subplots(2, len(columns), squeeze=False, sharex="col", height_ratios=(3, 2))
    for column, (above, below) in zip(columns, panels.T, strict=True):
        _draw_column(column, results[column.result]["details"]["trace"], above, below)
    _name_all(figure, list(panels.flat))
    settings = outcome["settings"]
    what = f"{settings['tokens']:,} tokens in chunks of {settings['chunk_size']}, {settings['dtype']}"
    title = "What is believed before each prompt, and what is measured"
    figure.suptitle(f"{title}\n{what}", fontsize=11, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _draw_column(column: _Column, trace: Sequence[Plain], above: Axes, below: Axes) -> None:
    shown = _shown(column, trace)
    for panel in (above, below):
        _shade(panel, shown)
        panel.set_yscale("log")
        _number_plainly(panel)
        panel.grid(True, axis="y", color="#e4e4e4", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for number, prompt in enumerate(shown):
        _draw_beliefs(above, number, prompt, _chunks(prompt))
        _draw_measured(above, number, prompt, _chunks(prompt))
    below.plot(
        [number + 0.5 for number in range(len(shown))], [prompt["seconds"] for prompt in shown], "o-",
        color=BOTH, ms=5, lw=1.6, label="this cache", zorder=3,
    )  # fmt: skip
    pairs = _others(column, trace, shown)
    below.plot(
        [number + 0.5 for number, _ in pairs], [seconds for _, seconds in pairs], "s",
        color=LIMIT, mfc="none", ms=7, ls="none", label="one that knew only what is now", zorder=2,
    )  # fmt: skip
    above.set_title(column.title, fontsize=10)
    above.set(ylabel="seconds per chunk", xlim=(0, len(shown)))
    below.set(xlabel="prompt of the cache, its chunks from left to right", ylabel="seconds of the whole prompt")
    below.set_xticks([number + 0.5 for number in range(len(shown))], [str(n + 1) for n in range(len(shown))])
    below.tick_params(axis="x", length=0)


def _shown(column: _Column, trace: Sequence[Plain]) -> list[Plain]:
    """Returns the prompts of the first turn; of a cache that continues from another one's, those after the load."""
    mine = [prompt for prompt in trace if prompt["arm"] in column.caches and prompt["turn"] == 0]
    first = column.caches[0]
    return [p for p in mine if len(column.caches) == 1 or (p["phase"] == "beside a load") == (p["arm"] == first)]


def _others(column: _Column, trace: Sequence[Plain], shown: Sequence[Plain]) -> list[tuple[int, float]]:
    """Returns the number of each prompt that another cache answered in turns with this one, and the other's seconds."""
    pairs: list[tuple[int, float]] = []
    for phase in {prompt["phase"] for prompt in shown}:
        numbers = [number for number, prompt in enumerate(shown) if prompt["phase"] == phase]
        others = [p["seconds"] for p in trace if p["arm"] in column.others and p["phase"] == phase != "learning"]
        pairs += zip(numbers, others, strict=False)
    return sorted(pairs)


def _chunks(prompt: Plain) -> int:
    return 1 + max(int(row[0]) for rows in (prompt["computed"], prompt["loaded"]) for row in rows)


def _draw_beliefs(panel: Axes, number: int, prompt: Plain, chunks: int) -> None:
    believed = prompt["believed"]
    if believed["compute_base"] is not None:
        costs = [believed["compute_base"] + believed["compute_slope"] * index for index in (0, chunks)]
        panel.plot([number, number + 1], costs, color=COMPUTE, lw=1.8, label="computing, as believed")
    if believed["load_interval"] is not None:
        label = "loading, as believed"
        panel.plot([number, number + 1], [believed["load_interval"]] * 2, color=LOAD, lw=1.8, label=label)


def _draw_measured(panel: Axes, number: int, prompt: Plain, chunks: int) -> None:
    def at(rows: Sequence[Sequence[float]]) -> list[float]:
        return [number + (row[0] + 0.5) / chunks for row in rows]

    loaded = sorted(prompt["loaded"], key=lambda row: row[1] + row[2])
    ends = [row[1] + row[2] for row in loaded]
    begin = min((row[1] for row in loaded), default=0.0)
    gaps = [end - before for before, end in zip([begin, *ends], ends, strict=False)]
    for rows, values, colour, marker, label in (
        (prompt["computed"], [row[2] for row in prompt["computed"]], COMPUTE, "o", "a chunk computed"),
        (loaded, gaps, LOAD, "o", "a chunk loaded (since the one before)"),
        (
            prompt["preempted"],
            [row[2] for row in prompt["preempted"]],
            LEFT,
            "x",
            "a forward that was left, until then",
        ),
    ):
        seen = [(x, value) for x, value in zip(at(rows), values, strict=True) if value > 0]
        if seen:
            panel.plot(*zip(*seen, strict=True), marker, color=colour, ms=4, ls="none", label=label, zorder=3)


def _shade(panel: Axes, shown: Sequence[Plain]) -> None:
    number = 0
    for phase, prompts in groupby(prompt["phase"] for prompt in shown):
        end = number + len(list(prompts))
        if phase in SHADES:
            colour, label = SHADES[phase]
            panel.axvspan(number, end, color=colour, lw=0, label=label, zorder=0)
        number = end


def _number_plainly(panel: Axes) -> None:
    """Formats numbers as 0.5 and 20, not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _name_all(figure: Figure, panels: Sequence[Axes]) -> None:
    """Adds a legend with each label once, however many panels have it."""
    named = {}
    for panel in panels:
        named.update(dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True)))
    columns = 2 if len(panels) == 2 else 4
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
