"""Examples in docstrings: an indented block after a blank line, as people write it, is code."""

from __future__ import annotations

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


def _is_prose(line: str) -> bool:
    return bool(line) and not line.startswith(" ")
