"""All cells in a few numbers: how many met their goals, and which was the worst."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.grid.group import Cell, Group

Found = Sequence[tuple[str, Cell]]


def summarise(groups: Iterable[Group]) -> dict[str, object]:
    """Returns for ratio and eta: cells with a goal, those that met it, and the worst of them by name. JSON-ready."""
    cells = [(f"{group.point}, {cell.source}", cell) for group in groups for cell in group.cells]
    return {"cells": len(cells), "ratio": _of("ratio", max, cells), "eta": _of("eta", min, cells)}


def _of(figure: str, worst_of: Callable[..., tuple[str, Cell]], cells: Found) -> dict[str, object]:
    judged = [(name, cell) for name, cell in cells if cell.figures[figure].met is not None]
    if not judged:
        return {"judged": 0, "met": 0}
    name, worst = worst_of(judged, key=lambda pair: pair[1].figures[figure].value)
    met = sum(bool(cell.figures[figure].met) for _, cell in judged)
    goal = str(worst.figures[figure].goal)
    return {"goal": goal, "judged": len(judged), "met": met, "worst": worst.figures[figure].value, "worst_cell": name}
