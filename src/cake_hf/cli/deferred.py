"""Commands whose modules are imported when they are run: torch and transformers take seconds, a list of commands should not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from cake_hf.cli.console import PlainErrors


@dataclass(frozen=True)
class Deferred:
    """Where a command is.

    Attributes:
        target: "module:name" of a function with typer's annotations, or of a `typer.Typer` with commands of its own.
        help: one line for the list of commands.
    """

    target: str
    help: str

    def load(self, name: str) -> Any:
        """The command, from its module."""
        module, attribute = self.target.split(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command = typer.main.get_command(found)
        else:
            alone = typer.Typer(add_completion=False)
            alone.command(name)(found)
            command = typer.main.get_command(alone)
        command.name = name
        return command


class _Commands(Mapping[str, Any]):
    """Commands by name; looking one up imports it."""

    def __init__(self, deferred: Mapping[str, Deferred]) -> None:
        self._deferred = deferred
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._deferred[name].load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deferred)

    def __len__(self) -> int:
        return len(self._deferred)


def deferring(deferred: Mapping[str, Deferred]) -> type[PlainErrors]:
    """A group of these commands, for `typer.Typer(cls=...)`."""

    class Group(PlainErrors):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands: Any = _Commands(deferred)

        def list_commands(self, ctx: Any) -> list[str]:
            return list(deferred)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            """What the list of commands shows of it; None if there is no such command."""
            return TyperCommand(cmd_name, help=deferred[cmd_name].help) if cmd_name in deferred else None

        def resolve_command(self, ctx: Any, args: Any) -> Any:
            """The command itself, to be run."""
            name, listed, rest = super().resolve_command(ctx, args)
            return name, listed and self.commands[listed.name], rest

    return Group
