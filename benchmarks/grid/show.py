"""The grid for people: one table per model and share of the device, and how the goals were met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from benchmarks.figures import Figure
from benchmarks.grid.group import Cell, Group
from benchmarks.grid.peers import FORMATS
from benchmarks.grid.run import Grid
from benchmarks.grid.summary import summarise
from benchmarks.machine import disturbance
from benchmarks.table import build_tables
from cake_hf.cli.sheets import Sheet
from cake_hf.util.sizes import seconds_text

RECOMPUTED = ("plain_seconds", "one_forward_seconds")

LEGEND = (
    "Time to the first token, medians of the rounds. T* is the least time of any split, eta = T*/T (in brackets where it is "
    "not judged: few chunks, or one side hardly helps), sigma = T/Tc + T/Tl, ratio = T over the better of compute-only and "
    "load-only. chunks, whole: a DynamicCache computed by chunks or in one forward; torch, safetensors: one that was saved "
    "whole, loaded, then used; faster: both ends over the best of these. The JSON has the spread of each."
)


def build(grid: Grid) -> RenderableType:
    """Returns all tables, what was left out, and the summary."""
    parts: list[RenderableType] = []
    for (shape, share), found in groupby(grid.groups, key=lambda group: (group.point.shape, group.point.share)):
        groups = list(found)
        title = (
            f"{shape}, {grid.axes.dtype} on {grid.axes.device}, chunks of {grid.axes.chunk_size}{_share(share, groups)}"
        )
        parts.append(_cells_table(title, groups))
        if grid.axes.peers:
            parts.append(_peers_table(groups))
    parts.append(build_tables(grid.decoding.values()))
    parts.append(Text(LEGEND, style="dim"))
    parts += [Text(f"{name}: left out, there was no time", style="yellow") for name in grid.left_out]
    parts += _summary(grid)
    if told := disturbance(grid.machine.as_dict()):
        parts.append(Text(told, style="yellow"))
    return Lines(*parts)


def _share(wanted: float, groups: Sequence[Group]) -> str:
    left = [group.figures["share_left"].value for group in groups if "share_left" in group.figures]
    if wanted == 1 or not left:
        return ""
    return f"; a competing load for {1 - wanted:.0%} of it leaves {min(left):.0%} to {max(left):.0%}"


def _cells_table(title: str, groups: Sequence[Group]) -> Sheet:
    headings = ("Gbps", "compute", "load", "both", "T*", "eta", "sigma", "ratio")
    rows: list[Sequence[str | Text]] = []
    for group in groups:
        compute = _seconds(group.figures.get("compute_seconds"))
        for first, cell in _cells(group):
            figures = cell.figures
            times = [_seconds(figures[f"{name}_seconds"]) for name in ("load", "both", "limit")]
            judged = [_judged(figures["eta"]), Text(f"{figures['sigma'].value:.2f}"), _judged(figures["ratio"])]
            rows.append((_tokens(group), cell.source, f"{cell.gbps:.3g}", compute * first, *times, *judged))
        if group.failure:
            rows.append((_tokens(group), Text("failed", style="red"), *("" for _ in headings)))
        rows.append(())
    return _new_table(title, headings, rows)


def _peers_table(groups: Sequence[Group]) -> Sheet:
    rows: list[Sequence[str | Text]] = []
    for group in groups:
        recomputed = [group.figures[name] for name in RECOMPUTED if name in group.figures]
        for first, cell in _cells(group):
            saved = [cell.figures[f"{name}_seconds"] for name in FORMATS]
            ours = cell.figures["both_seconds"]
            faster = min(figure.value for figure in (*recomputed, *saved)) / ours.value
            alone = [_seconds(figure) * first for figure in recomputed]
            alone += [""] * (len(RECOMPUTED) - len(alone))
            rows.append((_tokens(group), cell.source, *alone, *map(_seconds, saved), _seconds(ours), f"{faster:.2f}x"))
        rows.append(())
    headings = ("chunks", "whole", *FORMATS, "both", "faster")
    return _new_table("  the same with transformers alone", headings, rows)


def _new_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Sheet:
    return Sheet(title, ("tokens", "<store", *headings), rows, names=2)


def _cells(group: Group) -> Iterable[tuple[bool, Cell]]:
    """Yields each cell, and whether it is the first: figures that cells share are shown once."""
    return ((number == 0, cell) for number, cell in enumerate(group.cells))


def _tokens(group: Group) -> str:
    return f"{group.point.tokens:,}"


def _seconds(figure: Figure | None) -> str:
    return "" if figure is None else seconds_text(figure.value)


def _judged(figure: Figure) -> Text:
    text = f"{figure.value:.2f}"
    return {None: Text(f"({text})"), True: Text(text, "green"), False: Text(text, "red")}[figure.met]


def _summary(grid: Grid) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for shape, found in grid.exactness.items():
        good = len(found.tried) - len(found.wrong)
        text = f"{shape}: {good} of {len(found.tried)} restores bit for bit as computed"
        lines.append(_line(text, good=not found.wrong))
    for name, told in summarise(grid.groups).items():
        if isinstance(told, dict) and told["judged"]:
            counts = f"{name} {told['goal']} in {told['met']} of {told['judged']} cells"
            text = f"{counts}; worst {told['worst']:.2f} ({told['worst_cell']})"
            lines.append(_line(text, good=told["met"] == told["judged"]))
    return lines


def _line(text: str, *, good: bool) -> Text:
    return Text(text, style="green" if good else "red")
