"""Plots the grid from its JSON alone: results of one machine can be plotted on another.

    ttft-<shape>-<tokens>.png       time to first token over bandwidth, one panel per share of the device
    timeline-<shape>-<tokens>.png   the actors' work on each chunk over time, in one run

matplotlib is an extra (`plots`), and is imported when something is plotted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cells import optimum
from benchmarks.grid.axes import BITS_PER_BYTE, GIGA
from cake_hf.errors import CakeError
from cake_hf.plots import BOTH, COMPUTE, LIMIT, LOAD, draw_lanes, new_figure, require_matplotlib
from cake_hf.report import Span
from cake_hf.util.sizes import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plain = dict[str, Any]

PEERS = {
    "plain_seconds": ("DynamicCache, by chunks", "#b08968", "-."),
    "one_forward_seconds": ("DynamicCache, one forward", "#c9ada7", "-."),
    "torch_seconds": ("whole cache, torch.save", "#8e6bbf", ":"),
    "safetensors_seconds": ("whole cache, safetensors", "#c2559d", ":"),
}
"""Figure -> label, colour, line."""

POINTS = 80
DPI = 150
NEAR = 1.6
"""Labels of bandwidths nearer to each other than this would overlap."""


def draw(outcome: Plain, folder: Path) -> list[Path]:
    """Plots all pictures of a grid.

    Args:
        outcome: from `Grid.as_dict`, or read from its file.
        folder: for the PNGs; created if missing.

    Returns:
        The files, in the order of the groups.

    Raises:
        CakeError: matplotlib is not installed, or the outcome is not a grid's.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        groups = sorted(
            (g for g in outcome["groups"] if g["cells"]), key=lambda g: (g["shape"], g["tokens"], -g["share"])
        )
        drawn = []
        for (shape, tokens), found in groupby(groups, key=lambda group: (group["shape"], group["tokens"])):
            panels = list(found)
            name = f"{shape}-{tokens}.png"
            drawn.append(_save(_ttft_figure(panels, outcome["axes"]), folder / f"ttft-{name}"))
            drawn.append(_save(_timeline_figure(panels[0]), folder / f"timeline-{name}"))
    except (KeyError, TypeError, IndexError) as error:
        raise CakeError(
            f"This is not the outcome of `python -m benchmarks grid`: {error!r} is missing or of another kind."
        ) from error
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def _ttft_figure(groups: Sequence[Plain], axes: Plain) -> Figure:
    figure = new_figure(1.2 + 5.2 * len(groups), 5.6)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for group, panel in zip(groups, panels, strict=True):
        _draw_panel(panel, group)
    panels[0].set_ylabel("seconds to the first token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    first = groups[0]
    what = f"{first['shape']} model, {axes['dtype']} on {axes['device']}, chunks of {axes['chunk_size']}"
    figure.suptitle(f"{first['tokens']:,} tokens from a store ({what})", fontsize=12, fontweight="bold")
    return figure


def _draw_panel(panel: Axes, group: Plain) -> None:
    cells = sorted(group["cells"], key=lambda cell: cell["gbps"])
    low, high = cells[0]["gbps"] / 1.5, cells[-1]["gbps"] * 1.5
    _draw_measured(panel, cells, "both_seconds", "both ends", BOTH, "-", width=2.4)
    _draw_limit(panel, group["costs"], low, high)
    panel.axhline(group["compute_seconds"]["value"], color=COMPUTE, lw=1.8, label="compute-only")
    _draw_measured(panel, cells, "load_seconds", "load-only", LOAD, "-", width=1.8)
    for name, (label, colour, line) in PEERS.items():
        if name in group:
            panel.axhline(group[name]["value"], color=colour, ls=line, lw=1.4, label=label)
        elif name in cells[0]:
            _draw_measured(panel, cells, name, label, colour, line, width=1.4)
    _name_sources(panel, cells)
    panel.set(xscale="log", yscale="log", xlim=(low, high), xlabel="bandwidth of the store, 10$^9$ bits per second")
    panel.margins(y=0.18)
    for axis in (panel.xaxis, panel.yaxis):
        _number_plainly(axis)
    panel.set_title(_share_text(group), fontsize=10)
    panel.grid(True, which="major", color="#e4e4e4", lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _name_sources(panel: Axes, cells: Sequence[Plain]) -> None:
    """Writes the sources' names above their points, staggered if they are near each other."""
    lowered, previous = False, 0.0
    for cell in cells:
        lowered = not lowered and cell["gbps"] < NEAR * previous
        previous = cell["gbps"]
        panel.annotate(
            _source_text(cell["source"]),
            (cell["gbps"], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -16 if lowered else -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color="#555555",
        )


def _number_plainly(axis: Any) -> None:
    """Formats numbers as 0.5 and 20, not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_measured(
    panel: Axes, cells: Sequence[Plain], name: str, label: str, colour: str, line: str, *, width: float
) -> None:
    """Draws medians with their spread, joined if the store was throttled; hollow if the bandwidth is measured, too."""
    slowed = [cell for cell in cells if cell["throttled"]]
    panel.plot(*_points(slowed, name), line, color=colour, lw=width, label=label, zorder=3)
    for found, face in ((slowed, colour), ([cell for cell in cells if not cell["throttled"]], "white")):
        x, y = _points(found, name)
        below = [value - cell[name]["low"] for cell, value in zip(found, y, strict=True)]
        above = [cell[name]["high"] - value for cell, value in zip(found, y, strict=True)]
        panel.errorbar(x, y, yerr=[below, above], fmt="o", color=colour, mfc=face, ms=2.5 * width, capsize=2, zorder=3)


def _points(cells: Sequence[Plain], name: str) -> tuple[list[float], list[float]]:
    return [cell["gbps"] for cell in cells], [cell[name]["value"] for cell in cells]


def _draw_limit(panel: Axes, costs: Plain, low: float, high: float) -> None:
    """Draws T* for all bandwidths between those of the cells."""
    rates = [low * (high / low) ** (n / (POINTS - 1)) for n in range(POINTS)]
    per_load = [costs["chunk_bytes"] * BITS_PER_BYTE / (rate * GIGA) for rate in rates]
    limits = [optimum(costs["chunk_seconds"], seconds, costs["suffix_seconds"]) for seconds in per_load]
    panel.plot(rates, limits, "--", color=LIMIT, lw=1.3, label="T*, the least of any split", zorder=2)


def _source_text(source: str) -> str:
    return source.replace("gbps", " Gbps")


def _share_text(group: Plain) -> str:
    if group["share"] == 1:
        return "the device to itself"
    left = group["share_left"]["value"] if "share_left" in group else group["share"]
    return f"beside a competing load that leaves {left:.0%}"


def _timeline_figure(group: Plain) -> Figure:
    told = group["timeline"]
    spans = [Span(*span) for span in told["spans"]]
    figure = new_figure(10, 1.5 + 0.55 * len({span.actor for span in spans}))
    draw_lanes(figure, spans, told["seconds"])
    source = _source_text(told["source"])
    bandwidth = "" if source.endswith("Gbps") else f" ({told['gbps']:.3g} Gbps)"
    what = f"{group['chunks']} chunks, store: {source}{bandwidth}"
    title = f"{group['shape']} model, {group['tokens']:,} tokens in {what}: {seconds_text(told['seconds'])}"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure
