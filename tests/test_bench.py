"""The bench: that it runs to the end, that it notices wrong logits, and that its arithmetic is right."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import command as bench_command
from benchmarks import decoding, timing
from benchmarks.cells import optimum
from benchmarks.command import bench_app
from benchmarks.figures import Figure, Goal, Result
from benchmarks.machine import disturbance
from benchmarks.measuring import measure_all
from benchmarks.models import build_model
from benchmarks.settings import SHAPES, Settings, Shape, choose
from benchmarks.stolen import StolenTime, ticks
from benchmarks.table import build_tables
from benchmarks.timing import Sample, interleave, ratio
from benchmarks.workbench import Parity
from cake_hf import StoreError
from cake_hf.cli.console import console

pytest_plugins = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MEASUREMENTS = {"strategies", "saving", "decoding", "memory", "cached", "identity", "loading", "overheads"}
GOALS = {
    "strategies": {
        *("compute_over_plain", "ratio_at_0.5", "ratio_at_1", "ratio_at_2", "eta_at_0.5", "eta_at_1", "eta_at_2"),
        *("sigma_at_0.5", "sigma_at_1", "sigma_at_2"),
    },
    "saving": {"first_token_ratio", "generate_ratio"},
    "decoding": {"ratio"},
    "memory": {"chunks_per_thread", "chunks_per_thread_with_forward"},
    "cached": {"over_floor", "load_over_floor", "over_load", "over_unasked", "computed_chunks"},
    "identity": {"first_seconds"},
    "loading": {"speed_fresh_1", "speed_fresh_2"},
    "overheads": {"named_milliseconds", "decision_microseconds"},
}
TINY = ["--device", "cpu", "--quick", "--repeats", "1", "--tokens", "96", "--chunk-size", "32", "--dtype", "float32"]


def test_one_measurement_can_be_chosen() -> None:
    run = CliRunner().invoke(bench_app, [*TINY, "--json", "--only", "decoding"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["results"].keys() == {"decoding"}
    unknown = CliRunner().invoke(bench_app, [*TINY, "--only", "weather"])
    assert "choose from strategies, saving" in unknown.stderr


def test_bench_end_to_end(tmp_path: Path) -> None:
    run = CliRunner().invoke(
        bench_app, [*TINY, "--json", "--store", str(tmp_path / "stores"), "--out", str(tmp_path / "out.json")]
    )
    assert run.exit_code == 0, run.output
    assert len(run.stdout.splitlines()) == 1
    outcome = json.loads(run.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == outcome
    assert outcome.keys() == {"machine", "settings", "results", "parity", "failures", "seconds"}
    assert outcome["failures"] == []
    assert outcome["machine"].keys() >= {"cpu", "cores", "memory_gib", "python", "torch", "transformers"}
    assert Settings.from_dict(outcome["settings"]).tokens == 96
    assert outcome["parity"]["checks"] > 10
    assert outcome["parity"]["mismatches"] == []
    _check_goals(outcome["results"])
    _check_cells(outcome["results"]["strategies"]["details"]["cells"])
    assert list((tmp_path / "stores").iterdir()) == []  # nothing is left behind
    for private in (str(tmp_path), platform.node()):
        assert private not in run.stdout


def _check_goals(results: dict[str, Any]) -> None:
    assert results.keys() == MEASUREMENTS
    for name, wanted in GOALS.items():
        figures = {key: figure for key, figure in results[name].items() if key != "details"}
        if name == "memory" and not figures:
            continue  # no /proc here
        assert {key for key, figure in figures.items() if figure["goal"]} == wanted
        assert all(isinstance(figure["met"], bool) == bool(figure["goal"]) for figure in figures.values())


def _check_cells(cells: list[dict[str, Any]]) -> None:
    assert [cell["load_to_compute"] for cell in cells] == [0.5, 1.0, 2.0]
    rates = [cell["bytes_per_second"] for cell in cells]
    assert rates == sorted(rates, reverse=True)
    for cell in cells:
        assert cell.keys() >= {"load_seconds", "both_seconds", "ratio", "eta", "sigma", "parts", "slowdown"}
        assert cell["eta"]["value"] == pytest.approx(cell["limit_seconds"]["value"] / cell["both_seconds"]["value"])


def test_wrong_logits_and_only_they_decide_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    missed = Result("Nothing", {"slow": Figure("slow", 9.0, 9.0, 9.0, "x", Goal(1.0))})
    wrong = torch.tensor([1.0, 2.0])

    def fake(bench: Any) -> Result:
        bench.parity.check(torch.tensor([1.0, 2.0]), "first")
        bench.parity.check(wrong, "second")
        return missed

    monkeypatch.setattr(bench_command, "MEASUREMENTS", {"fake": fake})
    good = CliRunner().invoke(bench_app, TINY)
    assert good.exit_code == 0
    assert json.loads(good.stdout.splitlines()[-1])["results"]["fake"]["slow"]["met"] is False
    wrong[1] += 1e-6
    bad = CliRunner().invoke(bench_app, TINY)
    assert bad.exit_code == 1
    assert json.loads(bad.stdout.splitlines()[-1])["parity"]["mismatches"]


def test_what_cannot_be_measured_is_said_and_the_rest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Any) -> Result:
        raise StoreError("the disk is full")

    fine = Result("Fine", {"one": Figure("one", 1.0, 1.0, 1.0, "s")})
    monkeypatch.setattr(bench_command, "MEASUREMENTS", {"broken": broken, "fine": lambda bench: fine})
    run = CliRunner().invoke(bench_app, TINY)
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert run.exit_code == 1
    assert outcome["failures"] == ["broken: the disk is full"]
    assert outcome["results"]["fine"]["one"]["value"] == 1.0


def test_parity_sees_a_single_bit() -> None:
    parity, logits = Parity(), torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    parity.check(logits, "reference")
    parity.check(logits.clone(), "same")
    assert parity.as_dict() == {"checks": 1, "mismatches": []}
    flipped = logits.clone()
    flipped.view(torch.int16)[0, 1] ^= 1
    parity.check(flipped, "flipped")
    assert len(parity.mismatches) == 1


seconds = st.floats(min_value=1e-6, max_value=1e3)


@given(st.lists(seconds, max_size=12), seconds, seconds)
def test_optimum_is_the_best_of_all_splits(compute: list[float], load: float, suffix: float) -> None:
    n = len(compute)
    splits = [max(sum(compute[:m]), (n - m) * load) + suffix for m in range(n + 1)]
    best = optimum(compute, load, suffix)
    assert best == pytest.approx(min(splits))
    assert best <= sum(compute) + suffix + 1e-9
    assert best <= n * load + suffix + 1e-9


def test_optimum_of_equal_chunks_is_the_harmonic_bound() -> None:
    # Tc = 40 and Tl = 40 meet in the middle: Tc * Tl / (Tc + Tl).
    assert optimum([1.0] * 40, 1.0) == pytest.approx(20.0)
    assert optimum([], 1.0, 0.5) == 0.5


@given(st.lists(seconds, min_size=1, max_size=20))
def test_the_spread_is_around_the_median(values: list[float]) -> None:
    sample = Sample(tuple(values))
    low, high = sample.spread
    assert min(values) <= low <= sample.median <= high <= max(values)


def test_few_readings_are_described_by_their_ends_and_many_by_quartiles() -> None:
    assert Sample((3.0, 1.0, 2.0)).spread == (1.0, 3.0)
    assert Sample(tuple(float(v) for v in range(9))).spread == (2.0, 6.0)


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio(Sample((2.0, 4.0, 9.0)), Sample((1.0, 4.0, 3.0))) == (2.0, 1.0, 3.0)


def test_arms_take_turns_and_none_is_always_first() -> None:
    clock = count()
    times = interleave({"a": lambda: next(clock), "b": lambda: next(clock)}, rounds=4)
    assert times == {"a": [0, 3, 4, 7], "b": [1, 2, 5, 6]}


class Watch(StolenTime):
    """Says in turn what share of each run's time was stolen."""

    def __init__(self, shares: Iterable[float]) -> None:
        super().__init__(lambda: (0, 0))
        self._shares = iter(shares)

    def share(self) -> float:
        return next(self._shares)


def test_a_run_from_which_time_was_stolen_is_repeated_and_the_least_disturbed_counts() -> None:
    runs, watch = count(), Watch([0.9, 0.3, 0.2, 0.25, 0.05, 0.06, 0.0])
    times = interleave({"a": lambda: next(runs)}, rounds=4, watch=lambda: watch)
    # The first round is what it is; in the second the middle one of three counts; the third was good; then the second try.
    assert times == {"a": [0, 2, 4, 6]}


def test_no_measurement_counts_what_was_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run but the first ones is disturbed, and run three times."""
    monkeypatch.setattr(timing.StolenTime, "share", lambda self: 0.5)
    settings = choose(quick=True, repeats=2, tokens=None, chunk_size=None, dtype="float32")
    outcome, results = measure_all(settings, tmp_path, lambda line: None)
    assert outcome["failures"] == []
    assert outcome["parity"]["mismatches"] == []
    assert len(results) == len(MEASUREMENTS)
    assert outcome["machine"]["stolen_share"] == 0.5


def test_stolen_time_is_what_the_system_counts(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 10 60 5 0 5 10 7 0\ncpu0 1 2 3\n")
    assert ticks(stat) == (10, 100)
    watch = StolenTime(lambda: ticks(stat))
    assert watch.share() == 0
    stat.write_text("cpu  20 0 20 120 10 0 10 20 14 0\n")
    assert watch.share() == 0.1
    stat.write_text("cpu  10 0 10 60 5 0 5 12 7 0\n")
    assert watch.share() == 0, "two ticks are nothing"


@pytest.mark.parametrize("content", ["", "cpu 1 2 3", "cpu a b c d e f g h", None])
def test_where_the_system_does_not_count_nothing_is_stolen(tmp_path: Path, content: str | None) -> None:
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    assert ticks(stat) == (0, 0)
    assert StolenTime(lambda: ticks(stat)).share() == 0


def test_a_disturbed_machine_is_said_to_be_one() -> None:
    assert disturbance({"stolen_share": 0.05}) == disturbance({}) == ""
    assert disturbance({"stolen_share": 0.125}).startswith("12% of the processors' time")


def test_a_goal_is_met_at_its_limit() -> None:
    assert Goal(1.02).met_by(1.02)
    assert not Goal(1.02).met_by(1.03)
    assert Goal(0.9, at_most=False).met_by(0.95)
    assert str(Goal(1.02)) == "<= 1.02"
    assert Figure("x", 1.0, 1.0, 1.0, "s").met is None


def test_tables_fit_a_narrow_terminal() -> None:
    figure = Figure("first token over reading + suffix", 1234.567, 1.0, 9999.0, "x", Goal(1.02))
    with console.capture() as capture:
        console.print(build_tables([Result("Some title", {"a": figure}), Result("Other", {})]), width=80)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("1,234.567" in line and line.rstrip().endswith("no") for line in lines)


@pytest.mark.parametrize(("tokens", "chunk_size"), [(100, 64), (31, 16)])
def test_a_prefix_needs_two_chunks(tokens: int, chunk_size: int) -> None:
    with pytest.raises(ValueError, match="less than two chunks"):
        choose(quick=True, repeats=None, tokens=tokens, chunk_size=chunk_size, dtype="float32")


def test_the_shape_goes_with_the_device_and_can_be_chosen() -> None:
    def chosen(**options: Any) -> Shape:
        return choose(
            **{"quick": False, "repeats": None, "tokens": None, "chunk_size": None, "dtype": "x", **options}
        ).shape

    assert chosen() == SHAPES["small"]
    assert chosen(device="cuda:0") == SHAPES["1b"]
    assert chosen(device="cuda:0", shape="8b") == SHAPES["8b"]
    assert chosen(quick=True, device="cuda:0") == SHAPES["tiny"]
    with pytest.raises(ValueError, match="no model shape 'vast'; choose from tiny, small, small-mha, 1b, 8b"):
        chosen(shape="vast")


def test_the_model_is_made_in_its_dtype_and_the_same_each_time() -> None:
    settings = choose(quick=True, repeats=1, tokens=None, chunk_size=None, dtype="bfloat16")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = torch.get_rng_state()
        one, other = build_model(settings), build_model(settings)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float32
    assert {parameter.dtype for parameter in one.parameters()} == {torch.bfloat16}
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert one.lm_head.weight.float().std() > 0.01  # weights, not zeros


def test_decoding_is_rehearsed_where_kernels_are_chosen_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both caches are then again what they were: each step's logits are compared."""
    monkeypatch.setattr(decoding, "_chooses_by_length", lambda device: True)
    run = CliRunner().invoke(bench_app, [*TINY, "--json", "--only", "decoding"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["parity"]["mismatches"] == []
    assert found["results"]["decoding"]["ratio"]["value"] > 0


def test_decoding_has_to_be_faster_at_long_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LONG_CONTEXT", 96)
    run = CliRunner().invoke(bench_app, [*TINY, "--json", "--only", "decoding", "--device", "cpu"])
    assert json.loads(run.stdout)["results"]["decoding"]["ratio"]["goal"] == "<= 0.9"


def test_the_prefix_is_cut_to_full_chunks() -> None:
    settings = choose(quick=False, repeats=None, tokens=1000, chunk_size=128, dtype="bfloat16")
    assert (settings.tokens, settings.chunks, settings.suffix_tokens) == (896, 7, 64)
