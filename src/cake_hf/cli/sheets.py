"""Shows reports, timelines, bars, and tables that keep all their columns however narrow the terminal is, in a console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cake_hf.report import Report
from cake_hf.util.sizes import seconds_text

Cell = str | Text
ANY_WIDTH = 10_000


@dataclass(frozen=True)
class Sheet:
    """A table whose layout depends on the width available.

    If not all columns fit side by side, they are shown in several parts, one below the other, each with the columns that
    name a row. If even those and one more do not fit, cells take several lines.

    Attributes:
        title: above the table; empty for none.
        headings: the headings of the columns; one that starts with "<" marks a text column, aligned left.
        rows: each with as many cells as there are headings; an empty row ends a section.
        names: how many columns, from the left, name the row.
        tight: one space between columns instead of two.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int = 1
    tight: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, columns in enumerate(self._parts(console, options)):
            table = self._table(columns, whole=self._fits(console, options, columns))
            table.title = self.title if self.title and number == 0 else None
            yield table

    def _parts(self, console: Console, options: ConsoleOptions) -> Iterator[list[int]]:
        """Returns the columns of each part."""
        names = list(range(self.names))
        part = list(names)
        for column in range(self.names, len(self.headings)):
            if len(part) > self.names and not self._fits(console, options, [*part, column]):
                yield part
                part = list(names)
            part.append(column)
        yield part

    def _fits(self, console: Console, options: ConsoleOptions, columns: Sequence[int]) -> bool:
        wide = options.update(width=ANY_WIDTH)
        needed = Measurement.get(console, wide, self._table(columns, whole=True)).maximum
        return needed <= options.max_width

    def _table(self, columns: Sequence[int], *, whole: bool) -> Table:
        """Returns a table of some of the columns."""
        padding = (0, 0 if self.tight else 1, 0, 0)
        table = Table(title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=padding, pad_edge=False)
        for column in columns:
            heading = self.headings[column]
            is_text = heading.startswith("<")
            table.add_column(
                heading.removeprefix("<"), justify="left" if is_text else "right", no_wrap=whole, overflow="fold"
            )
        for row in self.rows:
            if row:
                table.add_row(*(_text(row[column]) for column in columns))
            else:
                table.add_section()
        return table


def _text(cell: Cell) -> Text:
    """Returns a cell in which nothing is read as markup."""
    return cell if isinstance(cell, Text) else Text(cell)


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
