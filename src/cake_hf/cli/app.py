"""The list of commands. Each command's module is imported when it runs, since torch and transformers take seconds to import.

Commands that have left the package say how to run them from a checkout.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import cake_hf
from cake_hf.cli.console import PlainErrors, console
from cake_hf.errors import CakeError


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


REPOSITORY = "https://github.com/cake-hf/cake-hf"


def moved(name: str, module: str) -> typer.Typer:
    """Returns a command of that name that only says so; its arguments belong to the new command line."""
    command = typer.Typer(add_completion=False)

    @command.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def say_where(context: typer.Context) -> None:
        line = " ".join(filter(None, ["python -m", module, shlex.join(context.args)]))
        raise CakeError(f"`cake-hf {name}` is not in the package any more: run `{line}` in a checkout of {REPOSITORY}.")

    say_where.__doc__ = f"Moved: run `python -m {module}` in a checkout of {REPOSITORY}."
    return command


bench = moved("bench", "benchmarks")
demo = moved("demo", "demo")
simulate = moved("simulate", "benchmarks simulate")

COMMANDS = {
    "warm": Deferred("cake_hf.cli.warm_command:warm_command", "Compute a document's KV once and keep it in a store."),
    "serve": Deferred(
        "cake_hf.cli.serve:serve_command", "Serve a model through an OpenAI-compatible API, with a store."
    ),
    "ls": Deferred("cake_hf.cli.look_commands:ls_command", "List what a store has, by namespace and by prompt."),
    "info": Deferred("cake_hf.cli.look_commands:info_command", "Show the totals of a store, or all of one chunk."),
    "why": Deferred("cake_hf.cli.why:why_command", "Say why a prompt is not found in a store."),
    "demo": Deferred("cake_hf.cli.app:demo", "A demonstration; it is in the repository now.", hidden=True),
    "verify": Deferred("cake_hf.cli.verify_command:verify_command", "Check what a store has, bit for bit."),
    "recode": Deferred("cake_hf.cli.recode:recode_command", "Store all chunks in another form."),
    "gc": Deferred("cake_hf.cli.gc:gc_command", "Delete chunks by age or for a budget."),
    "rm": Deferred("cake_hf.cli.rm:rm_command", "Delete the KV of a document, a model or a namespace."),
    "pin": Deferred("cake_hf.cli.pin:pin_command", "Protect chunks from eviction for some time."),
    "stats": Deferred("cake_hf.cli.look_commands:stats_command", "Show how much came from a store, day by day."),
    "bench": Deferred("cake_hf.cli.app:bench", "Measurements; they are in the repository now.", hidden=True),
    "plan": Deferred("cake_hf.cli.plan:plan_command", "Predict how a prompt would be restored, and how fast."),
    "export": Deferred("cake_hf.cli.pack_commands:export_command", "Write a document's KV as a pack, to a folder."),
    "push": Deferred("cake_hf.cli.pack_commands:push_command", "Publish a document's KV as a pack, on the Hub."),
    "pull": Deferred("cake_hf.cli.pack_commands:pull_command", "Copy a pack into a store of your own."),
    "simulate": Deferred(
        "cake_hf.cli.app:simulate", "Restores on a virtual clock; they are in the repository now.", hidden=True
    ),
}

app = typer.Typer(
    name="cake-hf",
    cls=deferring(COMMANDS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Keep the KV of long prompts in a store, and inspect it.",
)


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda asked: _show_version(asked), is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Keep the KV of long prompts in a store, and inspect it."""


def _show_version(asked: bool) -> None:
    if asked:
        console.print(f"cake-hf {cake_hf.__version__}")
        raise typer.Exit
