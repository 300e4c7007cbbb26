"""Tables at any width: every column and every cell is there, and rows keep their names."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence

import pytest
from rich.console import Console, RenderableType

from benchmarks.figures import Figure, Goal, Result
from benchmarks.simulation.command import BEYOND, PAPER, TITLES, _row, _table, setting_of
from benchmarks.table import build_tables
from cake_hf.cli.sheets import Sheet
from eval import score
from eval.compare import Metrics, ModeMetrics, TaskMetrics
from eval.tables import COLUMNS, results_table

HEADINGS = ("<name", "alpha", "beta", "gamma", "delta", "epsilon", "zeta")
ROWS = [[f"row {number} of a table", *(f"{number}.{column}" for column in range(6))] for number in range(4)]


def printed(what: RenderableType, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False, emoji=False).print(what)
    return out.getvalue()


def squeezed(text: str) -> str:
    """Without spaces and line breaks, which is what cells that go over several lines are made of."""
    return re.sub(r"[\s─]+", "", text)


@pytest.mark.parametrize("width", [200, 80, 60, 40, 24])
def test_every_cell_is_shown_at_any_width(width: int) -> None:
    text = printed(Sheet("A title", HEADINGS, ROWS), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("A title") == 1
    for cell in (*(heading.removeprefix("<") for heading in HEADINGS), *(cell for row in ROWS for cell in row[1:])):
        assert cell in text, cell


def test_columns_that_fit_are_shown_as_one_table() -> None:
    text = printed(Sheet("", HEADINGS, ROWS), 200)
    assert text.count("row 2 of a table") == 1
    assert next(line for line in text.splitlines() if "row 2" in line).split()[-6:] == ROWS[2][1:]


def test_each_part_names_its_rows() -> None:
    text = printed(Sheet("", HEADINGS, ROWS), 50)
    parts = text.count("name")
    assert parts > 1
    assert all(text.count(row[0]) == parts for row in ROWS)


def test_markup_is_shown_as_it_is() -> None:
    assert "[red]x[/red]" in printed(Sheet("[b]", ("<[i]a", "b"), [["[red]x[/red]", ":smile:"]]), 80)


@pytest.mark.parametrize("width", [120, 80, 60, 40])
@pytest.mark.parametrize(("title", "cases"), [(TITLES["paper"], PAPER), (TITLES["beyond"], BEYOND[:2])])
def test_simulated_cells_keep_their_names(title: str, cases: Sequence[object], width: int) -> None:
    rows = [_row(case.name, setting_of(case, 2), case.published) for case in cases[:3]]  # type: ignore[attr-defined]
    text = printed(_table(title, rows), width)
    assert "…" not in text
    assert all(row.name in text for row in rows)
    assert all(heading in text for heading in ("Cake", "ours", "T*", "eta", "sigma", "ratio", "first"))


@pytest.mark.parametrize("width", [120, 80, 60, 40])
def test_the_tables_of_the_evaluation(width: int) -> None:
    modes = {mode: ModeMetrics(rows=3, hit_rate=0.5, loaded=1.0) for mode in ("cold", "warm from the disk, again")}
    text = printed(results_table(Metrics(tasks={"multifieldqa_en": TaskMetrics(modes=modes)})), width)
    assert "…" not in text
    assert all(squeezed(heading) in squeezed(text) for heading in (*COLUMNS, "multifieldqa_en", *modes))


@pytest.mark.parametrize("width", [120, 40, 24])
def test_the_scores_of_the_evaluation(width: int) -> None:
    line = json.dumps({"dataset": "passage_retrieval_en", "pred": "1", "answers": ["1"], "all_classes": None})
    text = printed(score.table(score.score_lines([line])), width)
    assert "…" not in text
    assert all(heading in text for heading in ("task", "score", "metric", "rows", "skipped"))


@pytest.mark.parametrize("width", [120, 80, 50, 40])
def test_bench_tables_fit_any_width(width: int) -> None:
    figure = Figure("first token over reading + suffix", 1234.567, 1.0, 9999.0, "x", Goal(1.02))
    failed = Result(
        "Other", {}, failure="it could not be measured, since the disk that it was to be measured on is full."
    )
    text = printed(build_tables([Result("Some title", {"a": figure}), failed]), width)
    assert "…" not in text
    assert all(word in text for word in ("median", "low", "high", "goal", "met", "1,234.567", "no", "disk"))


def test_a_table_without_goals_has_no_verdicts() -> None:
    figure = Figure("first token", 1.0, 1.0, 1.0, "s")
    text = printed(build_tables([Result("Some title", {"a": figure})]), 80)
    assert not {"goal", "met", "yes", "no"} & set(text.split())
