"""Options that are declared once, as fields of a dataclass, are those of each command that takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from cake_hf.cli.app import COMMANDS
from cake_hf.cli.options import WarmedOptions, flat_options


@dataclass(frozen=True)
class Colours:
    shade: Annotated[str, typer.Option(help="Which one.")]
    dark: Annotated[bool, typer.Option(help="Less light.")] = False
    layer: Annotated[list[int] | None, typer.Option()] = None


@flat_options
def paint(
    wall: Annotated[str, typer.Argument()], colours: Colours, coats: Annotated[int, typer.Option(min=1)] = 1
) -> None:
    """Paint a wall."""
    typer.echo(f"{wall} {colours} {coats}")


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(paint)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("north", "--shade", "red"), "north Colours(shade='red', dark=False, layer=None) 1"),
        (("--dark", "north", "--shade", "red", "--coats", "2"), "north Colours(shade='red', dark=True, layer=None) 2"),
        (("n", "--shade", "s", "--layer", "1", "--layer", "2"), "n Colours(shade='s', dark=False, layer=[1, 2]) 1"),
    ],
)
def test_fields_are_options(arguments: tuple[str, ...], said: str) -> None:
    assert run(*arguments).stdout.strip() == said


def test_a_field_without_a_default_is_required() -> None:
    result = run("north")
    assert result.exit_code == 2
    assert "--shade" in result.stderr


@pytest.mark.parametrize("pair", [("rm", "pin"), ("export", "push"), ("verify", "why")])
def test_commands_that_take_a_document_have_the_same_options_for_it(pair: tuple[str, str]) -> None:
    one, other = ({p.name: (p.opts, p.help) for p in COMMANDS[name].load(name).params} for name in pair)
    shared = WarmedOptions.__dataclass_fields__
    assert set(shared) <= set(one) & set(other)
    assert all(one[name] == other[name] for name in shared)
