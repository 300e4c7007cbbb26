"""Known, wrong and unknown costs in simulated settings: what is promised holds whatever machine runs this."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from benchmarks.command import bench_app
from benchmarks.simulation import beliefs
from benchmarks.simulation.beliefs import BELIEFS, NEVER_SLOWER, Row, settings, table
from benchmarks.simulation.simulator import simulate, steps
from cake_hf.scheduling import frontier


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Of the settings with few chunks, which are the hardest and the quickest."""
    return {row.belief.name: row for row in table([one for one in settings() if one.chunks == 8])}


def test_with_known_costs_nothing_is_slower_than_the_better_single_method(rows: dict[str, Row]) -> None:
    assert max(rows["all costs known"].over_single) <= NEVER_SLOWER
    assert max(rows["all costs known"].over_best) <= NEVER_SLOWER


@pytest.mark.parametrize(
    ("belief", "most"),
    [
        ("loading believed 2x too dear", 1.06),
        ("loading believed 2x too cheap", 1.2),
        ("computing believed 2x too dear", 1.02),
        ("computing believed 2x too cheap", 1.06),
        ("nothing known", 1.03),
        ("loading believed 10x too dear, third prompt", 1.02),
        ("loading believed 10x too cheap, third prompt", 1.02),
    ],
)
def test_wrong_beliefs_cost_little(belief: str, most: float, rows: dict[str, Row]) -> None:
    assert max(rows[belief].over_best) <= most


def test_without_staging_they_would_cost_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(frontier, "HEDGE", 0.0)
    few = [one for one in settings() if one.chunks == 8 and one.threads == 2 and not one.holes]
    assert max(table(few)[0].over_best) > 1.5


def test_there_are_168_settings() -> None:
    assert len(list(settings())) == len(set(settings())) == 168


def test_holes_are_computed() -> None:
    where = beliefs.Setting(steps(4, 1.0), 1.0, 1e3, threads=1, holes=(1, 3))
    outcome = simulate(where, "load")
    assert (outcome.computed, outcome.loaded) == (2, 2)
    assert beliefs.best_seconds(where) == pytest.approx(2.0 + 0.002)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beliefs, "BELIEFS", BELIEFS[:2])
    monkeypatch.setattr(beliefs, "settings", lambda: list(settings())[:2])
    monkeypatch.setenv("COLUMNS", "110")
    result = CliRunner().invoke(bench_app, ["simulate", "--beliefs", "--json"])
    assert result.exit_code == 0, result.output
    assert "loading believed 2x too dear" in result.stdout
    [first, _] = json.loads(result.stdout.splitlines()[-1])["beliefs"]
    assert all(math.isfinite(value) for value in first["over_single"] + first["over_best"])


def test_the_command_refuses_other_settings() -> None:
    refused = CliRunner().invoke(bench_app, ["simulate", "--beliefs", "--changes"])
    assert refused.exit_code != 0
