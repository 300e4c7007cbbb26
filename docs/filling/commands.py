"""The command line as Markdown, from the same objects that `--help` is made of."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer.main

SPECIAL = re.compile(r"([\\*_|<>\[\]{}$~])")


@dataclass(frozen=True)
class Shown:
    """A command line.

    Attributes:
        name: what is typed.
        app: "module:name" of it.
        folder: of the repository, with its modules.
    """

    name: str
    app: str
    folder: str


SHOWN = {
    "cake-hf": Shown("cake-hf", "cake_hf.cli.app:app", "src/cake_hf/cli"),
    "benchmarks": Shown("python -m benchmarks", "benchmarks.command:bench_app", "benchmarks"),
}


def command_line(shown: Shown) -> str:
    """A section for each command, with its arguments and options."""
    module, name = shown.app.split(":")
    group: Any = typer.main.get_command(getattr(import_module(module), name))
    return "\n\n".join(_sections(group, shown.name, None))


def _sections(command: Any, name: str, parent: Any) -> list[str]:
    context = command.context_class(command, info_name=name, parent=parent)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {context.command_path}", f"```text\n{usage}\n```", _prose(command.help or "")]
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [f"| {_code(names)} | {_escaped(help_text)} |" for names, help_text in filter(None, records)]
    parts.append("\n".join(["| | |", "|---|---|", *rows]))
    for child, one in getattr(command, "commands", {}).items():
        parts += _sections(one, child, context)
    return parts


def _prose(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    return "\n\n".join(_escaped(" ".join(paragraph.split())) for paragraph in paragraphs)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|")  # a table ends its cell at a bar, even in code


def _escaped(text: str) -> str:
    """Text whose characters mean themselves; what stands in backticks is code already."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else SPECIAL.sub(r"\\\1", piece) for piece in pieces)
