"""Docstrings as we write them: an indented block after a blank line is code, and a sentence may have a colon."""

from __future__ import annotations

import inspect
from typing import Any


def show_examples(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """For `autodoc-process-docstring`: mark such blocks for reST. (Sections such as Args begin without a blank line.)"""
    marked: list[str] = []
    for number, line in enumerate(lines):
        starts = line.startswith("    ") and number > 1 and not lines[number - 1] and _is_prose(lines[number - 2])
        if starts:
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def keep_sentence(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """For the same, afterwards: a property's sentence with a colon in it does not begin with a type, as is made of it."""
    if what == "property":
        lines[:] = [*inspect.cleandoc(thing.__doc__ or "").splitlines(), ""]


def _is_prose(line: str) -> bool:
    return bool(line) and not line.startswith(" ")
