"""The bench's results for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.text import Text

from benchmarks.figures import Figure, Result
from cake_hf.cli.sheets import Sheet

LABEL_WIDTH = 34
NUMBER_WIDTH = 9
GOAL_WIDTH = 7
"""The least width, so that the columns of several tables line up."""


def build_tables(results: Iterable[Result]) -> Group:
    """Returns a table per measurement, with a row per figure: its median and its spread; and, if goals are set, these and
    whether they were met."""
    return Group(*(_table(result) for result in results))


def _table(result: Result) -> Sheet | Group:
    if not result.figures:
        return Group(Text(f"{result.title}\n", style="bold"), Text(f" {result.failure or 'not measured'}\n"))
    judged = any(figure.goal is not None for figure in result.figures.values())
    rows = [_row(figure, judged=judged) for figure in result.figures.values()]
    headings = ("<", "median", "low", "high", *(("goal", "<met") if judged else ()))
    return Sheet(result.title, headings, rows, tight=True)


def _row(figure: Figure, *, judged: bool) -> list[str | Text]:
    unit = "" if figure.unit in ("x", "chunks") else f", {figure.unit}"
    label = f"{figure.label}{unit}".ljust(LABEL_WIDTH)
    numbers = [f"{number:,.3f}".rjust(NUMBER_WIDTH) for number in (figure.value, figure.low, figure.high)]
    if not judged:
        return [label, *numbers]
    met = {None: Text(), True: Text("yes", "green"), False: Text("no", "red")}[figure.met]
    goal = "" if figure.goal is None else str(figure.goal)
    return [label, *numbers, goal.rjust(GOAL_WIDTH), met]
