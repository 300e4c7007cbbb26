"""Commands whose modules are imported when they run: torch and transformers take seconds to import, and a list of commands
should not."""

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
    """The location of a command.

    Attributes:
        target: "module:name" of a function with typer's annotations, or of a `typer.Typer` with commands of its own.
        help: one line for the list of commands.
        hidden: whether the list leaves it out.
    """

    target: str
    help: str
    hidden: bool = False

    def load(self, name: str) -> Any:
        """Imports the command's module and returns the command."""
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
    """Commands by name; each is imported when it is looked up."""

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
    """Returns a class of groups with these commands, for `typer.Typer(cls=...)`."""

    class Group(PlainErrors):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands: Any = _Commands(deferred)

        def list_commands(self, ctx: Any) -> list[str]:
            return list(deferred)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            """Returns an entry for the list of commands; None if there is no such command."""
            entry = deferred.get(cmd_name)
            return None if entry is None else TyperCommand(cmd_name, help=entry.help, hidden=entry.hidden)

        def resolve_command(self, ctx: Any, args: Any) -> Any:
            """Returns the command itself, to be run."""
            name, listed, rest = super().resolve_command(ctx, args)
            return name, listed and self.commands[listed.name], rest

    return Group
