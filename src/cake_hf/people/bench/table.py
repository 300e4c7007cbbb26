"""The bench's results for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cake_hf.people.bench.results import Figure, Result

LABEL_WIDTH = 34
NUMBER_WIDTH = 9


def build_tables(results: Iterable[Result]) -> Group:
    """For each measurement one row per figure: its median, its spread, its goal and whether that was met."""
    return Group(*(_table(result) for result in results))


def _table(result: Result) -> Table:
    table = Table(title=result.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    table.add_column("", width=LABEL_WIDTH)
    for heading in ("median", "low", "high", "goal"):
        table.add_column(heading, justify="right", width=NUMBER_WIDTH if heading != "goal" else 7)
    table.add_column("met", width=3)
    for figure in result.figures.values():
        table.add_row(*_row(figure))
    if not result.figures:
        table.add_row(result.failure or "not measured")
    return table


def _row(figure: Figure) -> tuple[str | Text, ...]:
    numbers = [f"{number:,.3f}" for number in (figure.value, figure.low, figure.high)]
    met = {None: Text(), True: Text("yes", "green"), False: Text("no", "red")}[figure.met]
    goal = "" if figure.goal is None else str(figure.goal)
    unit = "" if figure.unit in ("x", "chunks") else f", {figure.unit}"
    return (f"{figure.label}{unit}", *numbers, goal, met)
