"""`python -m benchmarks serve` runs, and gives what it says."""

from __future__ import annotations

import json
from pathlib import Path

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
