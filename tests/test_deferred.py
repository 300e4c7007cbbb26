"""The command line imports a command when it is run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from cake_hf import CakeError
from cake_hf.cli.app import COMMANDS, Deferred, app, deferring

RUN = """
import sys
from cake_hf.cli.app import app
sys.argv = ["cake-hf", *sys.argv[1:]]
try:
    app()
except SystemExit:
    pass
print([name for name in ("rich", "torch", "transformers") if name in sys.modules])
"""


def imported(*arguments: str) -> str:
    """Which libraries a fresh process has imported at the end of a command."""
    ended = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=120)
    return ended.stdout.splitlines()[-1]


@pytest.mark.parametrize("argument", ["--help", "--version", "lss"])
def test_what_needs_no_command_imports_none(argument: str) -> None:
    assert imported(argument) == "['rich']"


@pytest.mark.parametrize("command", [["ls", "/nowhere"], ["gc", "/nowhere", "--budget", "1GB"], ["info", "/nowhere"]])
def test_looking_at_a_store_needs_no_transformers(command: list[str]) -> None:
    assert imported(*command) == "['rich', 'torch']"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_of_its_own(name: str) -> None:
    listed = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["--help"])
    assert (COMMANDS[name].help in listed.output) != COMMANDS[name].hidden
    own = CliRunner().invoke(app, [name, "--help"])
    assert own.exit_code == 0
    assert f"cake-hf {name}" in own.output.replace("root", "cake-hf")


def a_group(target: str) -> typer.Typer:
    group = typer.Typer(cls=deferring({"one": Deferred(f"{__name__}:{target}", "The only one.")}))
    group.callback()(lambda: None)
    return group


def broken() -> None:
    raise CakeError("Something is wrong; do this.")


several = typer.Typer()
several.command("first")(broken)
several.command("second")(lambda: typer.echo("here"))


def test_errors_of_a_deferred_command_are_one_sentence() -> None:
    result = CliRunner().invoke(a_group("broken"), ["one"])
    assert result.exit_code == 2
    assert result.stderr.strip() == "Something is wrong; do this."


def test_a_deferred_command_may_have_commands_of_its_own() -> None:
    assert CliRunner().invoke(a_group("several"), ["one", "second"]).output == "here\n"


def test_a_command_that_is_not_where_it_should_be_is_no_silence() -> None:
    result = CliRunner().invoke(a_group("nowhere"), ["one"])
    assert isinstance(result.exception, AttributeError)
