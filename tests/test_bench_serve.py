"""`python -m benchmarks serve` runs, and gives what it says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
from typer.testing import CliRunner

from benchmarks.command import bench_app
from engine_runs import needs_engine

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


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_near_saturation_short_requests_hardly_notice_a_restore(share: float) -> None:
    """What steps take is a formula, so there is no noise."""
    from benchmarks.serve.virtual import Run, StepCosts
    from benchmarks.serve.workload import Bench, Workload, least_model

    load, costs = Workload(chunk=64, shorts=44, scale=0.375 / 8), StepCosts(token=8 * 2.1e-4, pair=64 * 7.6e-8)
    bench = Bench(least_model(load.dtype), load, 0.5, costs)

    def short(run: Run) -> float:
        return mean(seconds for name, seconds in run.ttft.items() if name != "document")

    alone, both = bench.run("load", share), bench.run("both", share)
    assert bench.others > 0.8 * 0.5 * bench.alone  # they keep the engine busy
    assert short(both) <= 1.15 * short(alone)
    assert both.span <= 1.03 * alone.span
    assert both.ttft["document"] <= alone.ttft["document"]
    assert both.answers == alone.answers
