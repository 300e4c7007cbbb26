"""The grid's pictures: drawn from plain data, and only with matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.command import bench_app
from benchmarks.grid import plots
from cake_hf import CakeError


def figure(seconds: float) -> dict[str, float]:
    return {"value": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds}


def group(shape: str, tokens: int, share: float, *, peers: bool = True) -> dict[str, Any]:
    times = {"load_seconds": figure(2.0), "both_seconds": figure(1.0)}
    peer_times = {"torch_seconds": figure(3.0), "safetensors_seconds": figure(2.5)} if peers else {}
    cells = [
        {"source": name, "gbps": gbps, "throttled": throttled, **times, **peer_times}
        for name, gbps, throttled in (("7gbps", 7.0, True), ("8gbps", 8.0, True), ("disk", 40.0, False))
    ]
    spans = [
        ["compute", 0, 0.1, 0.5, "computed"],
        ["compute", 1, 0.5, 0.6, "preempted"],
        ["load-0", 2, 0.1, 0.3, "loaded"],
        ["load-0", 1, 0.3, 0.6, "corrupt"],
        ["compute", -1, 0.6, 0.9, "computed"],
    ]
    return {
        "shape": shape,
        "tokens": tokens,
        "chunks": 3,
        "share": share,
        **({"share_left": figure(0.4)} if share < 1 else {}),
        "plain_seconds": figure(4.0),
        **({"one_forward_seconds": figure(3.5)} if peers else {}),
        "compute_seconds": figure(4.0),
        "cells": cells,
        "costs": {"chunk_seconds": [1.0, 1.2, 1.4], "suffix_seconds": 0.2, "chunk_bytes": 10**9},
        "timeline": {"source": "7gbps", "gbps": 7.0, "seconds": 0.9, "spans": spans},
        "failure": "",
    }


AXES = {"dtype": "bfloat16", "device": "cpu", "chunk_size": 512}


@pytest.mark.parametrize("peers", [True, False])
def test_two_pictures_for_each_model_and_length(tmp_path: Path, peers: bool) -> None:
    places = [("small", 4096, 0.5), ("small", 4096, 1.0), ("8b", 8192, 1.0)]
    failed = {"shape": "8b", "tokens": 16384, "share": 1.0, "cells": [], "failure": "out of memory"}
    groups = [*(group(*place, peers=peers) for place in places), failed]
    drawn = plots.draw({"axes": AXES, "groups": groups}, tmp_path / "made")
    assert [path.name for path in drawn] == [
        *("ttft-8b-8192.png", "timeline-8b-8192.png", "ttft-small-4096.png", "timeline-small-4096.png")
    ]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_panels_show_what_was_measured() -> None:
    drawn = plots._ttft_figure([group("small", 4096, 1.0), group("small", 4096, 0.5)], AXES)
    first, second = drawn.axes
    assert [second.get_title(), first.get_title()] == [
        "beside a competing load that leaves 40%",
        "the device to itself",
    ]
    lines = {line.get_label(): list(line.get_ydata()) for line in first.get_lines()}
    assert lines["both ends"] == [1.0, 1.0]  # the disk is not on the throttles' line
    assert lines["compute-only"] == [4.0, 4.0]
    assert set(lines) >= {"load-only", "T*, the least of any split", *(label for label, _, _ in plots.PEERS.values())}
    least = 1.0 + 0.2  # the first chunk computed while the others are loaded in no time
    assert min(lines["T*, the least of any split"]) >= 0.2
    assert max(lines["T*, the least of any split"]) <= 3.6 + 0.2 + 1e-9
    assert least < 3.8


def test_a_lane_per_thread() -> None:
    (panel,) = plots._timeline_figure(group("small", 4096, 1.0)).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["loader 0", "main thread"]
    assert {text.get_text() for text in panel.texts} >= {"0", "1", "2", "last piece", "first token"}


def test_plots_are_drawn_from_a_saved_file(tmp_path: Path) -> None:
    results, pictures = tmp_path / "grid.json", tmp_path / "pictures"
    results.write_text(json.dumps({"axes": AXES, "groups": [group("small", 4096, 1.0)]}))
    run = CliRunner().invoke(bench_app, ["plot", str(results), str(pictures)])
    assert run.exit_code == 0, run.output
    assert [Path(line).name for line in run.stdout.splitlines()] == ["ttft-small-4096.png", "timeline-small-4096.png"]
    assert all(Path(line).exists() for line in run.stdout.splitlines())
    results.write_text("[]")
    for broken in (results, tmp_path / "none.json"):
        run = CliRunner().invoke(bench_app, ["plot", str(broken), str(pictures)])
        assert run.exit_code == 2
        assert run.stderr.count("\n") == 1


def test_json_that_is_not_an_outcome_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CakeError, match="not the outcome of `python -m benchmarks grid`"):
        plots.draw({"results": {}}, tmp_path)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CakeError, match=r"pip install 'cake-hf\[plots\]'"):
        plots.draw({"axes": AXES, "groups": []}, tmp_path)
