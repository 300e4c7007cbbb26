"""`cake-hf plan`: what it prints, where costs come from, and what it refuses."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cake_hf.cli.app import app
from cake_hf.cli.plan import CURVE_LINES, read_costs, shown_splits
from cake_hf.scheduling.costs import TYPICAL, Brought
from cake_hf.scheduling.learning import CostLearner

Command = Callable[..., Result]

COSTS = ("--compute-base", 0.03, "--compute-slope", 0.002, "--chunk-mib", 64, "--gbps", 32)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `cake-hf plan` with these arguments."""
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, ["plan", *(str(argument) for argument in arguments)])


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Computing 0.5 s a chunk, loading 1 MiB chunks at 4 MiB/s."""
    learner = CostLearner()
    learner.saw_steps([(0, 0.5)])
    learner.saw_loads(2**20, [(0.0, 0.25), (0.25, 0.5)])
    path = tmp_path / "costs.json"
    path.write_text(learner.to_json(time.time()))
    return path


def line(result: Result, label: str) -> str:
    """What stands behind a label, spaces made single."""
    found = [" ".join(text.split()) for text in result.stdout.splitlines() if text.startswith(label)]
    assert len(found) == 1, result.stdout
    return found[0].removeprefix(label).strip()


def test_the_best_split_and_its_times(command: Command) -> None:
    result = command("--chunks", 32, *COSTS)
    assert result.exit_code == 0
    assert line(result, "decision") == "both: compute chunks 0-8, load chunks 9-31"
    assert line(result, "split") == "9 of 32 chunks computed"
    assert line(result, "computing") == "30 ms + 2 ms per chunk before it"
    assert line(result, "loading") == "64.0 MiB every 16.8 ms"
    assert line(result, "gain") == "1.39x over the better of the two alone"
    assert line(result, "compute only").endswith("1.95 s")
    assert line(result, "load only").endswith("537 ms")
    assert line(result, "both ends").endswith("386 ms 1.39x")
    assert line(result, "9 ").endswith("386 ms best")
    assert result.stdout.count("best") == 1


@pytest.mark.parametrize(
    ("more", "decision"),
    [
        (("--gbps", 0.001), "compute: load nothing"),
        (("--gbps", 100_000), "load: compute nothing before the suffix"),
        (("--gpu-share", 0.01), "load: compute nothing before the suffix"),
        (("--latency-ms", 10_000), "compute: load nothing"),
        (("--latency-ms", 100, "--threads", 64), "both: compute chunks 0-2, load chunk 3"),
    ],
)
def test_options_change_the_decision(command: Command, more: tuple[object, ...], decision: str) -> None:
    assert line(command("--chunks", 4, *COSTS, *more), "decision") == decision


def test_the_suffix_comes_on_top(command: Command) -> None:
    assert line(command("--chunks", 32, *COSTS, "--suffix", 10), "load only").endswith("10.54 s")


def test_measured_costs(command: Command, measured: Path) -> None:
    result = command("--chunks", 9, "--costs", measured)
    assert result.exit_code == 0
    assert line(result, "split") == "3 of 9 chunks computed"
    assert line(result, "both ends").endswith("1.50 s 1.50x")


def test_measured_costs_are_of_as_many_threads(command: Command, tmp_path: Path) -> None:
    """Two at a time wait their 0.2 s at once; asked for one, it waits each time."""
    learner = CostLearner()
    learner.saw_steps([(0, 0.5)])
    learner.saw_loads(2**20, [(0.0, 0.2), (0.0, 0.2), (0.2, 0.4), (0.2, 0.4)])
    path = tmp_path / "costs.json"
    path.write_text(learner.to_json(time.time()))
    assert line(command("--chunks", 4, "--costs", path), "loading") == "1.0 MiB every 100 ms"
    assert line(command("--chunks", 4, "--costs", path, "--threads", 1), "loading") == "1.0 MiB every 200 ms"


def test_a_file_of_costs_and_a_model_exclude_each_other(command: Command, measured: Path) -> None:
    result = command("--chunks", 4, "--costs", measured, "--model", "gpt2", "--store", "memory:")
    assert result.exit_code == 2
    assert "leave out --model and --store" in " ".join(result.stderr.split())


def test_options_override_measured_costs(command: Command, measured: Path) -> None:
    result = command("--chunks", 9, "--costs", measured, "--compute-base", 5, "--chunk-mib", 2)
    assert line(result, "loading") == "2.0 MiB every 500 ms"
    assert line(result, "compute only").endswith("45.00 s")


def test_half_measured_costs_need_the_other_half(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(CostLearner().to_json(time.time()))
    assert command("--chunks", 2, "--costs", path, *COSTS).exit_code == 0
    result = command("--chunks", 2, "--costs", path, *COSTS[:2])
    assert result.exit_code == 2
    assert "Give --gbps, or measured costs that know it with --costs." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give --compute-base"),
        (("--compute-base", -1), "compute base must be between 0 and 1e+06 seconds, got -1.0"),
        (("--compute-base", "nan"), "compute base must be"),
        (("--compute-base", 0.1, "--compute-slope", "inf"), "compute slope must be"),
        ((*COSTS, "--gbps", 0), "bandwidth must be between 1 and"),
        ((*COSTS, "--gbps", "nan"), "bandwidth must be"),
        ((*COSTS, "--chunk-mib", 0), "size of a chunk must be between 1 and"),
        ((*COSTS, "--latency-ms", -1), "load latency must be between 0 and"),
        ((*COSTS, "--threads", 0), "number of loader threads must be between 1 and"),
        ((*COSTS, "--suffix", -1), "must not be negative"),
        ((*COSTS, "--gpu-share", 0), "--gpu-share must be above 0 and at most 1, got 0.0"),
        ((*COSTS, "--gpu-share", 1.5), "--gpu-share must be"),
        ((*COSTS, "--gpu-share", "nan"), "--gpu-share must be"),
    ],
)
def test_out_of_range_values_are_one_sentence(command: Command, arguments: tuple[object, ...], message: str) -> None:
    result = command("--chunks", 4, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("chunks", [0, -1, 1_000_000])
def test_a_number_of_chunks_out_of_range_is_refused(command: Command, chunks: int) -> None:
    assert command("--chunks", chunks, *COSTS).exit_code == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", None])
def test_a_file_without_costs_is_named(command: Command, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_bytes(content)
    result = command("--chunks", 4, "--costs", path)
    assert result.exit_code == 2
    assert str(path) in result.stderr


def test_read_costs(measured: Path) -> None:
    costs = read_costs(measured)
    assert costs.compute is not None
    assert costs.load is not None
    assert (costs.compute.base, costs.load.bandwidth) == (0.5, 2**22)


@pytest.mark.parametrize("points", [2, 3, 33, 34, 100, 257, 100_001])
def test_the_curve_is_drawn_at_few_splits_with_the_best_one(points: int) -> None:
    for best in {0, 1, points // 3, points - 1}:
        shown = shown_splits(points, best)
        assert {0, best, points - 1} <= set(shown)
        assert len(shown) <= CURVE_LINES
        assert shown == sorted(set(shown))


EIGHT = ("--compute-base", 0.0274, "--compute-slope", 0.00105, "--chunk-mib", 64, "--threads", 2)


@pytest.mark.parametrize(
    ("codec", "size", "seconds"),
    [("none", "64.0 MiB", "844 ms"), ("lossless", "44.8 MiB", "711 ms"), ("near", "32.6 MiB", "609 ms")],
)
def test_a_codec_takes_fewer_bytes(command: Command, codec: str, size: str, seconds: str) -> None:
    """8B at 16K tokens behind 7 Gbps: 0.84, 0.71 and 0.61 s."""
    result = command("--chunks", 32, *EIGHT, "--gbps", 7, "--codec", codec)
    assert result.exit_code == 0, result.output
    assert line(result, "loading").startswith(size)
    assert line(result, "both ends").split("█ ")[-1].startswith(seconds)
    assert line(result, "codec").startswith(codec)


def test_each_form_is_listed_with_its_size(command: Command) -> None:
    result = command("--chunks", 32, *EIGHT, "--gbps", 7)
    assert line(result, "codec") == "none: chunks are stored as they are"
    for name, codec in TYPICAL.items():
        assert line(result, f"{name} ").endswith(f"{64 * codec.ratio:.1f} MiB")


@pytest.mark.parametrize(("gbps", "chosen"), [(1, "lossless"), (40, "lossless"), (100, "none"), (1000, "none")])
def test_auto_says_what_pays(command: Command, gbps: int, chosen: str) -> None:
    result = command("--chunks", 32, *EIGHT, "--gbps", gbps, "--codec", "auto")
    assert line(result, "codec").startswith(chosen)


@pytest.mark.parametrize("encoded", [4, 3, 1])
def test_measured_costs_of_encoded_chunks(command: Command, tmp_path: Path, encoded: int) -> None:
    """Four chunks of 1 MiB at 4 MiB/s by one loader; some have half of the bytes, and take 0.5 s to decode."""
    learner, ends = CostLearner(), 0.0
    learner.saw_steps([(0, 0.5)])
    spans, brought = [], []
    for number in range(4):
        one = Brought(2**19, 2**20, 0.5) if number < encoded else Brought(2**20, 2**20)
        spans.append((ends, ends + one.nbytes / 2**22 + one.decoding))
        brought.append(one)
        ends = spans[-1][1]
    learner.saw_loads(2**20, spans, brought)
    path = tmp_path / "costs.json"
    path.write_text(learner.to_json(time.time()))
    told = {}
    for codec in ("none", "lossless", ""):
        result = command("--chunks", 4, "--costs", path, *(("--codec", codec) if codec else ()))
        assert result.exit_code == 0, result.output
        told[codec] = line(result, "loading")
    assert told["none"] == "1.0 MiB every 250 ms"
    assert told["lossless"] == "512.0 KiB every 625 ms"
    assert told[""] == told["lossless" if encoded > 2 else "none"]
    assert "(measured)" in line(command("--chunks", 4, "--costs", path, "--codec", "lossless"), "codec")
    assert line(command("--chunks", 4, "--costs", path, "--codec", "auto"), "codec").startswith("none")


@pytest.mark.parametrize("codec", ["zip", "AUTO", "lossless "])
def test_an_unknown_codec_lists_those_that_there_are(command: Command, codec: str) -> None:
    result = command("--chunks", 4, *COSTS, "--codec", codec)
    assert result.exit_code == 2
    assert f"codec {codec!r} is unknown; choose one of none, lossless, near, int8, int4, auto." in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (9.0, "lossless: 0.70 .*; the finest within 9"),
        (0.62, "near: 0.51 .*; the finest within 620"),
        (0.1, "near: .*; yet not within 100"),
    ],
)
def test_a_time_to_keep_chooses_the_form(command: Command, seconds: float, text: str) -> None:
    result = command("--chunks", 32, *EIGHT, "--gbps", 7, "--max-ttft", seconds)
    assert re.search(f"codec {text}", " ".join(result.stdout.split()))


@pytest.mark.parametrize("more", [("--max-ttft", 0), ("--max-ttft", 1, "--codec", "near")])
def test_a_time_that_chooses_nothing_is_refused(command: Command, more: tuple[object, ...]) -> None:
    result = command("--chunks", 4, *COSTS, *more)
    assert result.exit_code == 2
    assert "--max-ttft must be positive, and chooses the form; leave out --codec." in result.stderr
