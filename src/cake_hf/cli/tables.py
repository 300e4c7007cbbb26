"""Shows reports as rich tables, and their timelines as coloured lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cake_hf.report import Report, Span
from cake_hf.util.sizes import seconds_text

COMPUTED = ("black on dark_orange", "black on orange3")
LOADED = ("white on dodger_blue3", "white on deep_sky_blue4")
LEFT = ("black on grey70", "black on grey62")
FAILED = ("white on red3", "white on dark_red")
"""Two shades for each outcome, so that neighbouring chunks can be told apart."""


STYLES = {
    "computed": COMPUTED,
    "gated": COMPUTED,
    "loaded": LOADED,
    "shared": LOADED,
    "preempted": LEFT,
    "superseded": LEFT,
}


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
    """A report's timeline: one line per actor, as wide as the console, each chunk at its time.

    Attributes:
        report: with the timeline.
        seconds: the time that the full width stands for; 0 for the end of the last span.
    """

    report: Report
    seconds: float = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lanes = self.report.lanes()
        total = self.seconds or max((span.end for span in self.report.timeline), default=0.0)
        if not lanes or total <= 0:
            return
        margin = max(len(actor) for actor in lanes) + 2
        width = max(10, options.max_width - margin)
        fill = "-" if options.ascii_only else "─"
        for actor, spans in lanes.items():
            yield Text.assemble((f"{actor:<{margin}}", "dim"), _lane(spans, total, width, fill))
        yield _axis(margin, width, total)


def legend(report: Report) -> Text:
    """Explains the colours in the report's lanes."""
    outcomes = {span.outcome for span in report.timeline}
    shown = [(f" {outcome} ", style[0]) for outcome, style in STYLES.items() if outcome in outcomes]
    if outcomes - set(STYLES):
        shown.append((" not usable ", FAILED[0]))
    return Text(" ").join(Text(*entry) for entry in shown)


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


def _lane(spans: Sequence[Span], total: float, width: int, fill: str) -> Text:
    """Returns an actor's lane: each span is its chunk's number and a line in its colour; even a short span gets a cell."""
    lane, position = Text(), 0
    for order, span in enumerate(sorted(spans, key=lambda span: span.start)):
        start = max(position, min(int(span.start / total * width), width - 1))
        end = min(width, max(start + 1, round(span.end / total * width)))
        if end <= start:
            continue
        label = "tail" if span.chunk < 0 else str(span.chunk)
        drawn = label.ljust(end - start, fill) if len(label) <= end - start else fill * (end - start)
        lane.append(" " * (start - position)).append(drawn, style=_style(span, order))
        position = end
    return lane


def _style(span: Span, order: int) -> str:
    shades = STYLES.get(span.outcome, FAILED)
    return shades[order % 2]


def _axis(margin: int, width: int, total: float) -> Text:
    end = seconds_text(total)
    return Text(f"{'':<{margin}}0{end:>{width - 1}}", style="dim")
