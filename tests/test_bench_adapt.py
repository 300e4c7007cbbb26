"""`benchmarks adapt`: that it runs to the end and stays exact, what its trace says, what it refuses. Never its times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import adapt, adapt_plot
from benchmarks.adapt import QUICK, Course, after_fall, after_load
from benchmarks.adapt_trace import Watched, copy_of, in_turns
from benchmarks.command import bench_app
from benchmarks.models import build_model, build_prompt
from benchmarks.settings import Settings, choose
from benchmarks.workbench import Workbench, cheap_collections
from cake_hf import CakeError
from cake_hf.scheduling.costs import MAX_SECONDS
from cake_hf.scheduling.learning import COLD_DEBT
from cake_hf.stores.marker import NOTES

pytest_plugins = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--device", "cpu", "--quick", "--tokens", "128", "--chunk-size", "32"]
CHUNKS = 4


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases by the command line, with all that it can do."""
    folder = tmp_path_factory.mktemp("adapt")
    places = [
        "--folder",
        folder / "stores",
        "--out",
        folder / "made" / "out.json",
        "--plot",
        folder / "plots" / "a.png",
    ]
    run = CliRunner().invoke(bench_app, ["adapt", *TINY, "--json", *map(str, places)])
    assert run.exit_code == 0, run.output
    assert len(run.stdout.splitlines()) == 1
    found: dict[str, Any] = json.loads(run.stdout)
    assert json.loads((folder / "made" / "out.json").read_text()) == found
    assert (folder / "plots" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "stores").iterdir()) == []  # nothing is left behind
    assert str(folder) not in run.stdout
    return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    settings = choose(quick=True, repeats=2, tokens=96, chunk_size=32, dtype="float32")
    with cheap_collections():
        yield Workbench(settings, build_model(settings), build_prompt(settings), tmp_path)


def test_all_cases_run_and_every_prompt_is_exact(outcome: dict[str, Any]) -> None:
    assert outcome.keys() == {"machine", "settings", "course", "results", "parity", "failures", "seconds"}
    assert Settings.from_dict(outcome["settings"]).dtype == "float32"
    assert outcome["failures"] == outcome["parity"]["mismatches"] == []
    traced = sum(len(result["details"]["trace"]) for result in outcome["results"].values())
    assert outcome["parity"]["checks"] >= traced


def test_the_ratios_that_are_judged(outcome: dict[str, Any]) -> None:
    goals = {
        f"{case}/{name}": figure["goal"]
        for case, result in outcome["results"].items()
        for name, figure in result.items()
        if name != "details" and figure["goal"]
    }
    judged = {"load/kept_later", "load/note_later"}
    judged |= {f"bandwidth/{way}_{part}" for way in ("fallen", "back") for part in ("second", "later")}
    assert goals == dict.fromkeys(judged, "<= 1.05")
    assert outcome["results"]["load"]["kept_later"]["label"] == f"same store, prompts 3-{QUICK.quiet}"


def test_the_trace_has_every_prompt_and_every_chunk_of_it(outcome: dict[str, Any]) -> None:
    course = Course(**outcome["course"])
    assert course == QUICK
    trace = outcome["results"]["load"]["details"]["trace"]
    assert _phases(trace, "kept") == ["beside a load"] * course.loaded + ["quiet"] * course.quiet
    assert _phases(trace, "note") == ["quiet"] * course.quiet
    assert _phases(trace, "quiet only") == ["learning"] * course.learning + ["quiet"] * course.quiet
    changes = outcome["results"]["bandwidth"]["details"]["trace"]
    changed = ["learning"] * course.learning + ["slow"] * course.changed + ["fast"] * course.changed
    assert _phases(changes, "changing") == changed
    assert _phases(changes, "slow only") == ["learning"] * course.learning + ["slow"] * course.changed
    for prompt in [*trace, *changes]:
        done = {row[0] for rows in (prompt["computed"], prompt["loaded"]) for row in rows}
        assert done == set(range(CHUNKS)), prompt  # a chunk may be there twice: it was computed while it came
        assert all(row[2] >= 0 for rows in ("computed", "preempted", "loaded") for row in prompt[rows])


def test_a_cache_begins_without_beliefs_or_with_those_of_the_note(outcome: dict[str, Any]) -> None:
    trace = outcome["results"]["load"]["details"]["trace"]
    kept = [prompt["believed"] for prompt in trace if prompt["arm"] == "kept"]
    assert kept[0]["compute_base"] is kept[0]["load_interval"] is None
    assert kept[1]["compute_base"] is not None or kept[1]["load_interval"] is not None
    note = next(prompt["believed"] for prompt in trace if prompt["arm"] == "note")
    same = kept[QUICK.loaded]
    assert note == {**same, "credit": note["credit"]}
    assert note["credit"] in (
        min(same["credit"], -COLD_DEBT),
        MAX_SECONDS,
    )  # of a doubtful note, computing may be tried at once


def test_the_counts_are_those_of_the_trace(outcome: dict[str, Any]) -> None:
    details = outcome["results"]["load"]["details"]
    counted = [[len(p["computed"]) for p in details["trace"] if p["arm"] == "kept" and p["phase"] == "quiet"]]
    assert details["chunks_computed"]["kept"]["changed"] == counted
    low, high = (outcome["results"]["bandwidth"]["details"]["bytes_per_second"][name] for name in ("low", "high"))
    assert high == pytest.approx(QUICK.fall * low)


def test_each_turn_begins_with_a_cache_that_knows_nothing(bench: Workbench) -> None:
    brief = Course(learning=1, loaded=1, quiet=3, changed=3, share=1)
    for measure, name in ((after_load, "kept"), (after_fall, "changing")):
        trace: Any = measure(bench, brief).details["trace"]
        firsts = [next(p for p in trace if (p["arm"], p["turn"]) == (name, turn)) for turn in (0, 1)]
        assert [first["believed"]["load_interval"] for first in firsts] == [None, None]
    assert bench.parity.mismatches == []


def test_wrong_logits_decide_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(bench: Workbench, course: Course) -> Any:
        for value in (1.0, 2.0):
            bench.parity.check(torch.tensor([value]), "wrong")
        raise CakeError("the disk is full")

    monkeypatch.setattr(adapt, "MEASUREMENTS", {"load": fake})
    run = CliRunner().invoke(bench_app, ["adapt", *TINY])
    assert run.exit_code == 1
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert outcome["failures"] == ["load: the disk is full"]
    assert len(outcome["parity"]["mismatches"]) == 1


def test_an_unknown_case_is_refused() -> None:
    run = CliRunner().invoke(bench_app, ["adapt", *TINY, "--only", "weather"])
    assert run.exit_code == 2
    assert "There is no case 'weather'; choose from load, bandwidth." in " ".join(run.output.split())


def test_one_case_can_be_chosen_and_drawn(tmp_path: Path) -> None:
    plot = tmp_path / "one.png"
    run = CliRunner().invoke(bench_app, ["adapt", *TINY, "--json", "--only", "bandwidth", "--plot", str(plot)])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["results"].keys() == {"bandwidth"}
    assert plot.exists()


def test_nothing_is_drawn_where_nothing_was_measured(tmp_path: Path) -> None:
    with pytest.raises(CakeError, match="nothing to be drawn"):
        adapt_plot.draw({"results": {"load": {"details": {}}}}, tmp_path / "none.png")


def test_copies_with_and_without_what_was_learnt(bench: Workbench) -> None:
    first = copy_of(bench.filled_store().root, bench, notes=False)
    assert not (first / NOTES).exists()
    with Watched(bench, "first", first, 1e9, []) as cache:
        cache.prompts("quiet", 2)
        again = copy_of(first, bench, notes=True)
    assert any((again / NOTES).iterdir())
    assert not first.exists()


def test_every_cache_gets_one_prompt_per_round_in_turns() -> None:
    order: list[str] = []

    def arm(name: str) -> Any:
        return lambda: order.append(name)

    in_turns({name: arm(name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc"


def _phases(trace: list[dict[str, Any]], cache: str) -> list[str]:
    return [prompt["phase"] for prompt in trace if prompt["arm"] == cache]
