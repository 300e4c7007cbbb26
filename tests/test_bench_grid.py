"""`python -m benchmarks grid`: that it runs to the end, what it judges, what it draws, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks.cells import Costs, calibrate, seconds_per_load
from benchmarks.command import bench_app
from benchmarks.grid import exactness
from benchmarks.grid.axes import PRESETS, Source
from benchmarks.grid.exactness import Examination, runs_of
from benchmarks.grid.group import Group, Point, Steadied, goals_for
from benchmarks.grid.peers import FORMATS, SavedCache
from benchmarks.grid.run import GroupClock, run, step_count
from benchmarks.models import build_model, build_prompt
from benchmarks.settings import Settings, shape_named
from benchmarks.workbench import Run, Workbench
from cake_hf import LocalStore, Report
from cake_hf.chunks.codec import checksums, encode_header, header_size, parse_header
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.report import Span
from cake_hf.testing import GateStore

pytest_plugins = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

Command = Callable[..., Result]

CHUNK = 32
TINY = ("--preset", "quick", "--device", "cpu", "--chunk-size", CHUNK)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `python -m benchmarks` with these arguments."""
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(bench_app, [*(str(argument) for argument in arguments)])


def workbench(folder: Path, chunks: int = 4) -> Workbench:
    settings = Settings(
        shape=shape_named("tiny"), tokens=chunks * CHUNK, suffix_tokens=8, chunk_size=CHUNK, dtype="float32", repeats=1
    )
    return Workbench(settings, build_model(settings), build_prompt(settings), folder)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole small grid by the command line, with all that it can do."""
    folder = tmp_path_factory.mktemp("grid")
    run = CliRunner().invoke(
        bench_app,
        [
            *("grid", *map(str, TINY), "--json", "--lengths", "64,256", "--stores", "memory,2x,0.5gbps"),
            *("--folder", str(folder / "stores"), "--out", str(folder / "made" / "out.json")),
            *("--plots", str(folder / "plots")),
        ],
    )
    assert run.exit_code == 0, run.output
    assert len(run.stdout.splitlines()) == 1
    found: dict[str, Any] = json.loads(run.stdout)
    assert json.loads((folder / "made" / "out.json").read_text()) == found
    assert list((folder / "stores").iterdir()) == []  # nothing is left behind
    assert [path.name for path in (folder / "made").iterdir()] == ["out.json"]
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"{kind}-tiny-{tokens}.png" for kind in ("ttft", "timeline") for tokens in (64, 256)
    }
    assert str(folder) not in run.stdout
    return found


def test_all_cells_are_measured_and_every_run_is_exact(outcome: dict[str, Any]) -> None:
    assert outcome["faults"] == outcome["left_out"] == []
    places = [(group["share"], group["tokens"]) for group in outcome["groups"]]
    assert places == [(1.0, 256), (1.0, 64), (0.5, 256), (0.5, 64)]
    assert outcome["summary"]["cells"] == outcome["summary"]["ratio"]["judged"] == 12
    assert outcome["exactness"]["tiny"]["runs"] == runs_of(8)
    assert outcome["decoding"]["tiny"]["ratio"]["goal"] == "<= 1"
    for group in outcome["groups"]:
        assert [cell["source"] for cell in group["cells"]] == ["memory", "2x", "0.5gbps"]
        assert ("share_left" in group) == (group["share"] < 1)
        for cell in group["cells"]:
            assert cell["eta"]["value"] == pytest.approx(cell["limit_seconds"]["value"] / cell["both_seconds"]["value"])
            assert {f"{name}_seconds" for name in FORMATS} < set(cell)
            if group["tokens"] == 64:
                assert cell["eta"]["met"] is None  # two chunks are too few to be judged
    # Calibrating, plain and compute-only, and for each store load, both and two peers: all but the first have to agree with it.
    # (The one big forward is no such run.)
    alone, beside = (outcome["parity"][f"tiny, 64 tokens{share}"] for share in ("", ", 50% of the device"))
    assert (alone["checks"], beside["checks"]) == (3 + 2 + 3 * 4 - 1, 2 + 3 * 4 + 1 - 1)
    assert alone["one_forward_runs"] == 1
    assert all(found["mismatches"] == [] for found in outcome["parity"].values())


def test_throttles_are_what_they_say(outcome: dict[str, Any]) -> None:
    for group in outcome["groups"]:
        cells = {cell["source"]: cell for cell in group["cells"]}
        assert cells["0.5gbps"]["gbps"] == pytest.approx(0.5)
        assert [cell["throttled"] for cell in cells.values()] == [False, True, True]
        # No file, ours or a peer's, came faster than the line allows.
        least = group["chunks"] * group["costs"]["chunk_bytes"] * 8 / 0.5e9
        for name in ("load_seconds", "torch_seconds"):
            assert cells["0.5gbps"][name]["low"] > 0.9 * least
    relative = {group["tokens"]: set() for group in outcome["groups"]}
    for group in outcome["groups"]:
        relative[group["tokens"]].add(group["cells"][1]["gbps"])
    assert all(len(rates) == 1 for rates in relative.values())  # the same with and without a competing load


def test_a_table_for_people_and_the_json_last(command: Command) -> None:
    result = command("grid", *TINY, "--lengths", 64, "--shares", 1, "--stores", "disk", "--no-parity", "--no-decode")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert json.loads(lines[-1])["summary"]["cells"] == 1
    assert max(map(len, lines[:-1])) <= 100
    assert any(line.split()[:2] == ["64", "disk"] for line in lines)
    assert any("ratio <= 1.05 in" in line for line in lines)


def test_the_gpu_preset_runs_on_any_device(command: Command) -> None:
    """One command for the machine that has one; here on the CPU with a model that fits."""
    small = ("--shape", "tiny", "--lengths", "64,96", "--chunk-size", CHUNK, "--stores", "memory,disk,7gbps,100gbps")
    result = command("grid", "--preset", "gpu", "--device", "cpu", "--json", "--repeats", 1, "--shares", 1, *small)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["axes"]["dtype"] == "bfloat16"
    assert found["exactness"]["tiny"]["wrong"] == found["left_out"] == []
    assert found["summary"]["cells"] == 8
    assert found["decoding"]["tiny"]["ratio"]["value"] > 0


def test_what_there_is_no_time_for_is_left_out_and_said(command: Command) -> None:
    result = command(
        "grid", *TINY, "--lengths", "64,128", "--shares", 1, "--no-parity", "--no-decode", "--minutes", 1e-9
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["groups"], found["left_out"]) == ([], ["tiny, 128 tokens", "tiny, 64 tokens"])
    assert "tiny, 128 tokens: left out" in result.stdout


def test_the_bar_counts_what_is_done(tmp_path: Path) -> None:
    quick = replace(PRESETS["quick"], tokens=(64, 96), chunk_size=CHUNK, sources=(Source("disk"),), shares=(1.0,))
    axes = replace(quick, peers=False, decode=False)
    steps: list[str] = []
    kept: list[int] = []
    run(axes, tmp_path, steps.append, lambda grid: kept.append(len(grid.groups)))
    assert len(steps) == step_count(axes)
    assert kept == [0, 1, 2, 2]  # the file grows group by group


def test_wrong_logits_decide_the_exit_code(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(self: SavedCache, *arguments: Any) -> Callable[[], Any]:
        load = original(self, *arguments)

        def wrong() -> Any:
            cache = load()
            cache.layers[0].keys[..., 0, :] += 1.0
            return cache

        return wrong

    original = SavedCache.loader
    monkeypatch.setattr(SavedCache, "loader", altered)
    result = command("grid", *TINY, "--lengths", 64, "--shares", 1, "--stores", "disk", "--no-parity", "--no-decode")
    assert result.exit_code == 1
    faults = json.loads(result.stdout.splitlines()[-1])["faults"]
    assert len(faults) == len(FORMATS)
    assert all("logits differ" in fault for fault in faults)


def test_exactness_sees_a_chunk_that_is_wrong_in_good_order(tmp_path: Path) -> None:
    """The negative control: one bit of a stored chunk, with a checksum that fits."""
    bench = workbench(tmp_path)
    store = bench.filled_store()
    with bench.cache(store) as cache:
        tamper(store, cache._session.bound_model.layout())
    examination = Examination(bench)
    names = list(examination.steps())
    assert names == examination.found.tried
    assert len(names) == runs_of(4)
    assert "warm, load: the logits differ" in examination.found.wrong
    assert not any(wrong.startswith("cold") for wrong in examination.found.wrong)


def test_exactness_sees_sides_that_do_not_meet_where_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the gate: with no chunk let through, everything is computed, and no bit differs."""
    monkeypatch.setattr(exactness, "_met_at", lambda *_: nullcontext())
    monkeypatch.setattr(exactness, "GateStore", lambda store: Emptied(store))
    examination = Examination(workbench(tmp_path))
    for _ in examination.steps():
        pass
    assert examination.found.wrong == [f"meeting at chunk {n}: the two sides met at chunk 4" for n in (1, 2, 3)]


class Emptied(GateStore):
    """What it is said to have cannot be read."""

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        return None


def tamper(store: LocalStore, layout: ChunkLayout) -> None:
    """Make one chunk another one, in good order."""
    key = next(store.keys())
    value = bytearray(store.read(key) or b"")
    facts, _ = parse_header(value)
    size = header_size(layout)
    payload = value[size:]
    payload[2] ^= 0x80
    header = encode_header(layout, replace(facts, checksums=checksums(payload, layout)))
    store.write(key, [header, payload], replace=True)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_cache_is_the_prefix_bit_for_bit(tmp_path: Path, name: str, memory: bool) -> None:
    bench = workbench(tmp_path)
    saved = SavedCache(bench, bench.fresh_folder())
    cache = saved.loader(name, None, saved.in_memory()[name] if memory else None)()
    with bench.cache(bench.filled_store(), strategy="load") as ours:
        ours.prefill(bench.ids)
        for layer, own in zip(cache.layers, ours.layers, strict=True):
            assert torch.equal(layer.keys, own.keys)
            assert torch.equal(layer.values, own.values)
    assert cache.get_seq_length() == bench.settings.tokens


def test_shorter_prompts_use_the_chunks_of_the_longest(tmp_path: Path) -> None:
    bench = workbench(tmp_path)
    short = bench.shorter(2 * CHUNK)
    assert short.filled_store() is bench.filled_store()
    assert short.cake_run(bench.filled_store(), "short", strategy="load").report.chunks_loaded == 2
    assert set(calibrate(short, [0.5, 2.0])) == {0.5, 2.0}


def test_eta_is_judged_where_both_sides_help_and_chunks_are_many() -> None:
    assert goals_for("cpu", 8, 0.9).eta is not None
    assert goals_for("cpu", 7, 0.5).eta is None
    assert goals_for("cpu", 64, 0.91).eta is None
    assert [str(goals_for(device, 4, 1.0).ratio) for device in ("cpu", "cuda:0")] == ["<= 1.05", "<= 1.02"]
    assert str(goals_for("cuda", 16, 0.5).eta) == ">= 0.95"


def test_loads_side_by_side_count_once() -> None:
    spans = [
        Span("load-0", 3, 1.0, 2.0, "loaded"),
        Span("load-1", 2, 1.5, 3.0, "loaded"),
        Span("load-0", 1, 4.0, 5.0, "late"),
    ]
    assert seconds_per_load([Run(9.0, 9.0, Report(timeline=spans))]) == pytest.approx(1.0)


def test_the_better_method_alone() -> None:
    costs = Costs([1.0, 2.0, 3.0], 0.5, 10)
    assert (costs.alone(1.0), costs.alone(5.0)) == (3.5, 6.5)
    assert costs.limit(1.0) == pytest.approx(2.5)  # the first chunk computed, the others loaded


# What is not expected to end in time is left out.


def test_a_group_takes_as_long_as_one_of_its_length_or_in_proportion_to_the_last_one() -> None:
    now, begun = 0.0, []

    def take(seconds: float, group: Group) -> Group:
        nonlocal now
        now += seconds
        return group

    clock = GroupClock(9, lambda: now)
    for tokens, share, seconds in (
        *((32768, 1.0, 200.0), (16384, 1.0, 110.0), (8192, 1.0, 60.0), (4096, 1.0, 50.0)),
        *((32768, 0.5, 999.0), (16384, 0.5, 999.0), (8192, 0.5, 110.0), (4096, 0.5, 999.0)),
    ):
        point = Point("8b", tokens, tokens // 512, share)
        if clock.allows(point):
            begun.append((tokens, share))
            clock.timed(partial(take, seconds, Group(point)))
    assert begun == [(32768, 1.0), (16384, 1.0), (8192, 1.0), (4096, 1.0), (8192, 0.5)]
    assert clock.seconds == 530
    clock.timed(partial(take, 1.0, Group(point, failure="out of memory")))
    assert not clock.allows(point), "a group that failed says nothing"
    assert clock.allows(Point("1b", 8192, 16, 0.5)), "nor does another model's"
    assert GroupClock(0, lambda: now).allows(Point("8b", 2**20, 2**11, 0.1))


# Short runs are repeated within a turn.


@pytest.mark.parametrize(
    ("seconds", "first", "second"),
    [
        ([0.1, 0.5, 0.1, 0.6, 0.1], 0.1, 0.5),
        ([2.0, 3.0, 1.0], 2.0, 3.0),
        ([0.01 * n for n in range(1, 20)], 0.01, 0.06),
    ],
)
def test_a_turn_of_short_runs_is_their_median(seconds: list[float], first: float, second: float) -> None:
    left = iter(seconds)
    arm = Steadied(lambda: Run(0.0, next(left), Report()), 1.0)
    assert arm().first_token_seconds == first
    assert arm().first_token_seconds == pytest.approx(second)
