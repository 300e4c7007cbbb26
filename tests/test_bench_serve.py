"""`python -m benchmarks serve` runs, and gives what it says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from benchmarks.command import bench_app
from engine_runs import needs_engine

if TYPE_CHECKING:
    from benchmarks.serve.virtual import Run
    from benchmarks.serve.workload import Bench

pytestmark = needs_engine


def test_the_bench_of_serving(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    done = CliRunner().invoke(bench_app, ["serve", "--quick", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert json.loads(done.stdout) == found
    assert found["details"]["same_tokens"]
    assert {"cold", "span_1", "ttft_1", "gain_1", "bound_1"} <= found.keys()
    runs = found["details"]["runs"]
    assert [run["loaded"] for run in runs["load 1.0"]] == [3]
    assert all(run["loaded"] + run["computed"] == 3 for run in runs["both 1.0"])
    assert [run["computed"] for run in runs["cold 0.0"]] == [3]
    assert [(run["loaded"], run["computed"]) for run in runs["plain 0.0"]] == [(0, 0)]  # transformers' own engine


@pytest.mark.parametrize(("chunk", "chunks"), [(512, 12), (512, 6), (128, 24)])
def test_the_prefix_has_three_tokens_for_one_of_the_short_prompts(chunk: int, chunks: int) -> None:
    from benchmarks.serve.workload import Workload

    _, shorts = Workload(chunk=chunk, chunks=chunks).prompts(64)
    assert chunk * chunks / sum(map(len, shorts)) == pytest.approx(3.1, rel=0.05)
    _, longer = Workload(chunk=chunk, chunks=chunks, scale=3.0).prompts(64)
    assert sum(map(len, longer)) == pytest.approx(3 * sum(map(len, shorts)), rel=0.05)


def simulated(spread: float, shorts: int) -> Bench:
    """What steps take is a formula, so there is no noise."""
    from benchmarks.serve.virtual import StepCosts
    from benchmarks.serve.workload import Bench, Workload, least_model

    load, costs = Workload(chunk=64, shorts=shorts), StepCosts(token=8 * 2.1e-4, pair=64 * 7.6e-8)
    return Bench(least_model(load.dtype), load, spread, costs)


def short(run: Run) -> float:
    return mean(seconds for name, seconds in run.ttft.items() if name != "document")


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_near_saturation_short_requests_hardly_notice_a_restore(share: float) -> None:
    bench = simulated(0.5, 44)
    alone, both = bench.run("load", share), bench.run("both", share)
    assert bench.others > 0.8 * 0.5 * bench.alone  # they keep the engine busy
    assert short(both) <= 1.15 * short(alone)
    assert both.span <= 1.03 * alone.span
    assert both.ttft["document"] <= alone.ttft["document"]
    assert both.answers == alone.answers


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_beside_few_requests_the_restore_gains_much_and_they_lose_little(share: float) -> None:
    """The last chunk is left to be loaded, since computing it would save next to nothing."""
    bench = simulated(4.0, 22)
    alone, both = bench.run("load", share), bench.run("both", share)
    assert both.ttft["document"] <= 0.6 * alone.ttft["document"]
    assert short(both) <= 1.15 * short(alone)


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_the_sum_of_all_waits_is_never_more_than_with_loading_alone(share: float) -> None:
    bench = simulated(1.0, 22)
    alone, both = bench.run("load", share), bench.run("both", share)
    assert sum(both.ttft.values()) <= sum(alone.ttft.values())
