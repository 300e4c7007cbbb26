"""What the grid can be asked for, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from benchmarks.command import bench_app
from benchmarks.grid.axes import PRESETS, Axes, Source, with_options

Command = Callable[..., Result]


@pytest.fixture
def command() -> Command:
    """Runs `python -m benchmarks` with these arguments."""
    return lambda *arguments: CliRunner().invoke(bench_app, [*(str(argument) for argument in arguments)])


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("memory", Source("memory")),
        (" Disk ", Source("disk")),
        ("7gbps", Source("gbps", 7.0)),
        ("0.5x", Source("times", 0.5)),
        ("100Gbps", Source("gbps", 100.0)),
    ],
)
def test_stores_by_name(text: str, source: Source) -> None:
    assert Source.parse(text) == source
    assert Source.parse(str(source)) == source


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_in_range_and_have_the_settings_of_their_longest_prompt(preset: str) -> None:
    axes = PRESETS[preset]
    for shape in axes.shapes:
        settings = axes.settings(shape)
        assert settings.tokens == max(axes.tokens)
        assert settings.tokens % settings.chunk_size == 0


def test_the_gpu_preset_is_what_was_promised() -> None:
    axes = PRESETS["gpu"]
    assert axes.lengths == [4096, 8192, 16384, 32768]
    assert {str(source) for source in axes.sources} >= {
        "memory",
        "disk",
        "7gbps",
        "25gbps",
        "32gbps",
        "56gbps",
        "100gbps",
    }
    assert (axes.shapes, axes.dtype, axes.parity) == (("8b",), "bfloat16", True)
    assert 0 < axes.minutes < 10


def test_options_take_the_place_of_the_presets() -> None:
    axes = with_options(
        PRESETS["cpu"],
        device="cpu",
        shapes="tiny,small",
        lengths="1100, 2048,1100",
        shares="1",
        stores="disk,2x",
        peers=False,
    )
    assert (axes.shapes, axes.lengths, axes.shares) == (("tiny", "small"), [1024, 2048], (1.0,))
    assert [str(source) for source in axes.sources] == ["disk", "2x"]
    assert axes.repeats == PRESETS["cpu"].repeats
    assert not axes.peers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stores", "tape"), "There is no store 'tape'"),
        (("--stores", "0gbps"), "out of range: 0.001 to 100000 Gbps"),
        (("--stores", "1e9x"), "There is no store"),
        (("--stores", "1000x"), "out of range: 0.01 to 100 x"),
        (("--stores", ","), "no sources; give one"),
        (("--lengths", "much"), "--lengths takes numbers separated by commas, got 'much'"),
        (("--lengths", "512"), "length of a prompt, in tokens, must be from 1,024 to 2,097,152, got 512"),
        (("--lengths", "99999999"), "must be from 1,024 to"),
        (("--shares", "0.05"), "must be from 0.1 to 1, got 0.05"),
        (("--shares", "nan"), "must be from 0.1 to 1, got nan"),
        (("--shares", "1.5"), "must be from 0.1 to 1"),
        (("--shape", "huge"), "There is no model shape 'huge'; choose from tiny, small"),
        (("--chunk-size", "8"), "must be from 16 to"),
        (("--minutes", "-1"), "number of minutes must be from 0 to"),
        (("--device", "tpu"), "The device 'tpu' cannot be used here"),
    ],
)
def test_out_of_range_is_one_sentence(command: Command, options: tuple[str, ...], message: str) -> None:
    result = command("grid", "--preset", "cpu", "--device", "cpu", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_options_before_the_sub_command_are_not_lost_in_silence(command: Command) -> None:
    result = command("--quick", "grid")
    assert result.exit_code == 2
    assert "Give the options after the sub-command: python -m benchmarks grid ..." in result.stderr


def test_an_empty_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="no shapes"):
        Axes(shapes=(), tokens=(1024,), shares=(1.0,), sources=(Source("disk"),))
