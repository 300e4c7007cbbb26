"""Settings come from a file and the command line, and name the run's folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.config import MODES, SETTINGS, BrokenConfig, RunConfig, add_options, make_config, read_config
from eval.tasks import UnknownTask

ROOT = Path(__file__).parent.parent
MINIMAL = {"model": "m", "tasks": ["qasper"], "store": "s"}


def options(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(arguments))


def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: one\ntasks: [qasper, trec]\nrows: 7\nkeep_chunks: true\nseed: 1\n")
    config = make_config(read_config(tmp_path / "run.yaml"), options("--model", "two", "--seed", "3", "--sabotage"))
    assert (config.model, config.tasks, config.rows, config.seed) == ("two", ("qasper", "trec"), 7, 3)
    assert (config.keep_chunks, config.sabotage) == (True, True)
    assert (config.chunk_size, config.dtype) == (512, "auto")
    assert options() == {}


def test_every_setting_is_an_option_with_help() -> None:
    for name, setting in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        given = options(flag) if isinstance(setting.default, bool) else options(flag, "1")
        assert list(given) == [name]
        assert setting.metadata["help"]


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = make_config(MINIMAL, options("--tasks", "qasper, trec,", "--rows", "3", "--modes", "warm"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    assert make_config(read_config(tmp_path / "config.yaml")) == config


def test_the_digest_names_all_settings_but_the_folder() -> None:
    config = make_config(MINIMAL)
    assert make_config(MINIMAL, {"out": "elsewhere"}).digest == config.digest
    assert make_config(MINIMAL, {"modes": "plain,chunked,cold,warm,middle,faults"}).digest == config.digest
    others = [{"seed": 1}, {"rows": 3}, {"sabotage": True}, {"tasks": "trec"}, {"dtype": "bfloat16"}, {"modes": "warm"}]
    assert len({config.digest, *(make_config(MINIMAL, other).digest for other in others)}) == len(others) + 1
    assert len(config.digest) == 12


@pytest.mark.parametrize(
    ("wanted", "resolved"),
    [
        ("warm", ("plain", "chunked", "cold", "warm")),
        ("faults,plain", ("plain", "chunked", "cold", "faults")),
        ("cold", ("plain", "chunked", "cold")),
        ("", ("plain", "chunked")),
        (",".join(MODES), MODES),
    ],
)
def test_modes_bring_what_they_build_on(wanted: str, resolved: tuple[str, ...]) -> None:
    assert make_config({"modes": wanted}).modes == resolved


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modes": "lukewarm"}, "no mode 'lukewarm'; choose from plain"),
        ({"too_long": "guess"}, "one of truncate, skip"),
        ({"rows": 0}, "rows is 0; it has to be more"),
        ({"rows": "many"}, "rows is 'many'; it is meant to be records"),
        ({"rows": True}, "rows is True"),
        ({"sabotage": "yes"}, "sabotage is 'yes'"),
        ({"tasks": 3}, "tasks is 3"),
        ({"model": None, "chunk_size": None}, "chunk_size is None"),
        ({"chunk_size": 8}, "at least 16"),
        ({"fault_rate": 1.5}, "a share"),
        ({"save_queue_gib": float("nan")}, "save_queue_gib is nan"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BrokenConfig, match=words):
        make_config({name: value for name, value in settings.items() if name != "model"})


def test_an_unknown_task_lists_the_tasks() -> None:
    with pytest.raises(UnknownTask, match="known are narrativeqa"):
        make_config({"tasks": "qasper,quasper"})


@pytest.mark.parametrize("missing", ["model", "tasks", "store"])
def test_a_missing_setting_is_named(missing: str) -> None:
    make_config(MINIMAL).check_complete()
    with pytest.raises(BrokenConfig, match=f"Say --{missing}, for example"):
        make_config({name: value for name, value in MINIMAL.items() if name != missing}).check_complete()


@pytest.mark.parametrize(
    ("text", "words"),
    [("modle: x", "no setting 'modle' .* known are model"), ("- a", "no mapping"), ("a: [", "cannot be read")],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(BrokenConfig, match=words):
        read_config(tmp_path / "run.yaml")
    with pytest.raises(BrokenConfig, match="cannot be read"):
        read_config(tmp_path / "nowhere.yaml")


def test_the_quick_config_is_complete() -> None:
    config = make_config(read_config(ROOT / "eval" / "quick.yaml"))
    config.check_complete()
    assert config.modes == MODES
    assert (config.data, config.model) == ("generated", "recall-tiny")
    assert RunConfig().tasks == ()
