"""A machine that changes, and beliefs that are wrong: the goals, in every simulated setting, whatever machine runs them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.command import bench_app
from benchmarks.simulation import changes
from benchmarks.simulation.changes import CHANGES, Row, settings, table
from benchmarks.simulation.simulator import Setting, best_after, best_seconds, simulate, steps
from benchmarks.simulation.speeds import CONSTANT, Speed, bursts, drift, noise, step


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.name: row for row in table(list(settings()))}


@pytest.mark.parametrize("name", CHANGES)
def test_the_goal_is_met_in_every_setting(name: str, rows: dict[str, Row]) -> None:
    row = rows[name]
    assert row.goal is None or max(row.both) <= row.goal
    assert sorted(row.both)[len(row.both) // 2] <= 1.05


@pytest.mark.parametrize(
    "name",
    [
        "bandwidth a tenth, in the middle",
        "computing believed 4x, third prompt",
        "loading believed 1/4, first prompt",
        "after a passing load, prompts 3-10",
        "bandwidth fell to a tenth, 2nd prompt",
    ],
)
def test_beliefs_that_are_not_corrected_miss_it(name: str, rows: dict[str, Row]) -> None:
    """The negative control."""
    row = rows[name]
    assert row.goal is not None
    assert max(row.fixed) > row.goal


def test_correcting_costs_next_to_nothing_where_a_machine_is_noisy(rows: dict[str, Row]) -> None:
    for name in ("noise of 30 % on both", "bursts of a quarter on both", "drift: computing to 0.3x, line to 3x"):
        assert max(rows[name].both) <= 1.1


def test_the_command_prints_each_change_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(iter(CHANGES))
    monkeypatch.setattr(changes, "CHANGES", {first: CHANGES[first]})
    monkeypatch.setattr(changes, "settings", lambda: list(settings())[:1])
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(bench_app, ["simulate", "--changes", "--json"])
    assert result.exit_code == 0, result.output
    assert first in result.stdout
    (row,) = json.loads(result.stdout.splitlines()[-1])["changes"]
    assert (row["change"], row["goal"], len(row["both"])) == (first, 1.25, len(changes.MOMENTS))
    refused = CliRunner().invoke(bench_app, ["simulate", "--changes", "--tokens", "512"])
    assert refused.exit_code == 2
    assert "--changes has settings of its own; leave out --tokens." in refused.stderr


# Speeds that change, and the least time that they allow.


def test_work_is_done_at_the_speed_of_its_time() -> None:
    speed = Speed(((1.0, 0.5), (3.0, 4.0)))
    assert [speed.at(when) for when in (0.0, 1.0, 2.9, 3.0)] == [1.0, 0.5, 0.5, 4.0]
    assert speed.end(0.0, 1.0) == 1.0
    assert speed.end(0.0, 1.5) == 2.0
    assert speed.end(0.0, 4.0) == 3.5
    assert speed.end(2.0, 0.0) == 2.0
    assert speed.work(0.0, 3.5) == 4.0


speeds = st.lists(st.tuples(st.floats(0.01, 5), st.floats(0.1, 10)), max_size=5).map(
    lambda parts: Speed(tuple((sum(gap for gap, _ in parts[: n + 1]), speed) for n, (_, speed) in enumerate(parts)))
)


@given(speeds, st.floats(0, 20), st.floats(0, 20))
def test_an_end_is_when_so_much_work_is_done(speed: Speed, start: float, work: float) -> None:
    assert speed.work(start, speed.end(start, work)) == pytest.approx(work, abs=1e-9)


def test_speed_changes_take_their_stated_values() -> None:
    assert step(2.0, 3.0).at(2.0) == 3.0
    assert [bursts(4.0, 1.0, 0.5, 8.0).at(when) for when in (0.0, 1.0, 4.5, 9.0)] == [0.5, 1.0, 0.5, 1.0]
    assert drift(0.0, 8.0, 0.25).at(8.0) == pytest.approx(0.25)
    assert noise([0.5, 2.0], 1.0).at(1.5) == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (((1.0, 1.0), (1.0, 2.0)), "must grow"),
        (((-1.0, 1.0),), "must grow"),
        (((float("nan"), 1.0),), "must grow"),
        (((0.0, 0.0),), "speed must be between"),
        (((0.0, float("nan")),), "speed must be between"),
    ],
)
def test_senseless_speeds_are_refused(changes: tuple[tuple[float, float], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Speed(changes)


def test_the_best_from_the_start_on_is_the_best() -> None:
    where = Setting(steps(8, 1.0), 1.0, 2.0, suffix=0.5, threads=1)
    outcome = simulate(where, "both")
    assert where.compute_speed is CONSTANT
    assert best_after(where, outcome, 0.0) == pytest.approx(best_seconds(where))


def test_what_is_half_done_counts_for_the_best_from_then_on() -> None:
    """Two chunks of 1 s to compute, 4 s to load, one thread. At 0.5 s, half of chunk 0 and an eighth of chunk 1 is there."""
    where = Setting(steps(2, 1.0), 4.0, 1.0, threads=1)
    outcome = simulate(where, "both")
    assert outcome.seconds == 2.0
    assert best_after(where, outcome, 0.5) == pytest.approx(2.0)
    assert best_after(where, outcome, 1.5) == pytest.approx(2.0)
