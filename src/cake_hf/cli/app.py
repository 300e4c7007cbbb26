"""The list of commands; those that have left the package say how to run them from a checkout."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

import cake_hf
from cake_hf.cli.console import console
from cake_hf.cli.deferred import Deferred, deferring
from cake_hf.errors import CakeError

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
    "stats": Deferred("cake_hf.cli.stats:stats_command", "Show how much came from a store, day by day."),
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
