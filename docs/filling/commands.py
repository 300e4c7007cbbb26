"""The command line as Markdown, from the same objects that `--help` is made of."""

from __future__ import annotations

import inspect
import re
from typing import Any

import typer.main

SPECIAL = re.compile(r"([\\*_|<>\[\]{}$~])")


def command_line() -> str:
    """A section for each command of `cake-hf`, with its arguments and options."""
    from cake_hf.people.cli import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(_sections(group, "cake-hf", None))


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
