"""Shows reports, their timelines, and seconds as bars, in a console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cake_hf.report import Report
from cake_hf.util.sizes import seconds_text


def report_table(report: Report) -> Table:
    """Returns a table of the label and value of each line of a report."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in report.rows():
        table.add_row(label, Text(value))
    return table


@dataclass(frozen=True)
class Lanes:
    """A report's timeline as text, as wide as the console, with the meaning of its characters."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        margin = max((len(actor) for actor in self.report.lanes()), default=0) + len(" ||")
        lanes = self.report.text_lanes(max(10, options.max_width - margin))
        if lanes:
            yield Text("\n".join(lanes), no_wrap=True)
            yield Text("numbers: chunks, t: last piece; =: used, ~: no longer needed, !: unusable", style="dim")


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart.

    Attributes:
        label: what was measured.
        seconds: how long it took.
        style: colour.
        note: shown after the number.
    """

    label: str
    seconds: float
    style: str
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars of seconds on one scale, as wide as the console."""

    bars: Sequence[Bar]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        longest = max((bar.seconds for bar in self.bars), default=0.0)
        if longest <= 0:
            return
        labels = max(len(bar.label) for bar in self.bars)
        tails = [f" {seconds_text(bar.seconds)}{'  ' + bar.note if bar.note else ''}" for bar in self.bars]
        width = max(10, options.max_width - labels - 2 - max(len(tail) for tail in tails))
        block = "#" if options.ascii_only else "█"
        for bar, tail in zip(self.bars, tails, strict=True):
            cells = max(1, round(bar.seconds / longest * width))
            yield Text.assemble((f"{bar.label:<{labels}}  ", "dim"), (block * cells, bar.style), tail)
