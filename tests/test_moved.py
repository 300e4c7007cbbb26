"""Commands that are in the repository and no longer in the package: each says in one sentence where it went."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from cake_hf.cli.app import REPOSITORY
from commands import run_command

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("called", "line"),
    [
        (["bench"], "python -m benchmarks"),
        (["bench", "grid", "--preset", "quick"], "python -m benchmarks grid --preset quick"),
        (["bench", "--model", "my model", "--repeats", "3"], "python -m benchmarks --model 'my model' --repeats 3"),
        (["bench", "--json"], "python -m benchmarks --json"),
        (["demo", "--model", "Qwen/Qwen3-0.6B"], "python -m demo --model Qwen/Qwen3-0.6B"),
        (["simulate"], "python -m benchmarks simulate"),
        (["simulate", "--changes"], "python -m benchmarks simulate --changes"),
    ],
    ids=shlex.join,
)
def test_a_moved_command_says_what_to_run_instead(called: list[str], line: str) -> None:
    result = run_command(*called)
    assert result.exit_code == 2
    told = f"`cake-hf {called[0]}` is not in the package any more: run `{line}` in a checkout of {REPOSITORY}."
    assert result.stderr.strip() == told
    assert result.stdout == ""


def test_the_repository_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Homepage"] == REPOSITORY


@pytest.mark.parametrize("name", ["bench", "demo", "simulate"])
def test_the_help_of_a_moved_command_says_where_it_went(name: str) -> None:
    result = run_command(name, "--help")
    assert result.exit_code == 0
    assert f"checkout of {REPOSITORY}" in " ".join(result.stdout.split())
