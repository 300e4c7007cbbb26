"""Commands that have left the package: each says how to run it from a checkout."""

from __future__ import annotations

import shlex

import typer

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
