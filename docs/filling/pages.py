"""Which marker in a page stands for what, and how links come along when a file becomes a page."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filling.commands import SHOWN, command_line
from filling.parity import FILES, all_runs
from filling.results import all_results

ROOT = Path(__file__).resolve().parent.parent.parent

PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "docs/families.md": "models.md",
    "eval/README.md": "evaluation.md",
}
"""Files of the repository that readers of the pages find under another name."""

MARKER = re.compile(r"^<!-- filled with (\w+)(?: (.+?))? -->$", re.MULTILINE)
REPOSITORY = "https://github.com/cake-hf/cake-hf/blob/main/"
"""How the README links to files, so that its links also lead somewhere on a package index."""
LINK = re.compile(rf"\]\(({re.escape(REPOSITORY)}|(?!https?:|#))([^)#\s]+)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


class CannotFill(Exception):
    """A marker asks for something that is not there; the sentence says what."""


def fill_page(app: Any, name: str, source: list[str]) -> None:
    """For Sphinx's `source-read`: fill a page, and have it read again whenever what it was filled with changes."""
    source[0], files = fill(source[0])
    for file in files:
        app.env.note_dependency(str(file))


def fill(text: str) -> tuple[str, list[Path]]:
    """A page with its markers replaced, and the files that went into it.

    Raises:
        CannotFill: there is no such kind, file or section, or a link in it has no page to go to.
    """
    files: list[Path] = []

    def replace(found: re.Match[str]) -> str:
        kind, what = found[1], found[2] or ""
        if kind not in FILLINGS:
            raise CannotFill(f"Nothing is known by the name {kind!r}; known are {', '.join(FILLINGS)}.")
        return FILLINGS[kind](what, files)

    return MARKER.sub(replace, text), files


def _file(name: str, files: list[Path]) -> str:
    path = ROOT / name
    if not path.is_file():
        raise CannotFill(f"There is no file {name} in the repository.")
    files.append(path)
    text = path.read_text(encoding="utf-8")
    return _with_links(re.sub(r"\A# .*\n", "", text), name).strip()


def _section(what: str, files: list[Path]) -> str:
    name, _, title = what.partition(": ")
    text = _file(name, files)
    blank = FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), text)  # a comment in code is no heading
    begin = re.search(rf"^## {re.escape(title)}$", blank, re.MULTILINE)
    if begin is None:
        raise CannotFill(f"{name} has no section {title!r}.")
    end = re.compile(r"^##? ", re.MULTILINE).search(blank, begin.end())
    return text[begin.end() : end.start() if end else None].strip()


def _with_links(text: str, name: str) -> str:
    """Links to other files of the repository lead to the pages that these are shown on.

    An absolute link to a file without a page stays as it is.
    """

    def to_page(found: re.Match[str]) -> str:
        folder = "" if found[1] else posixpath.dirname(name)
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        inside = target.removeprefix("docs/")
        page = PAGES.get(target) or (inside if inside != target else None)
        if page is None and found[1]:
            return found[0]
        if page is None:
            raise CannotFill(f"{name} links to {target}, which is on no page.")
        return f"]({page}"

    return LINK.sub(to_page, text)


def _results(folder: str, files: list[Path]) -> str:
    files.extend(sorted((ROOT / folder).glob("*.json")))
    return all_results(files)


def _parity(folder: str, files: list[Path]) -> str:
    runs = sorted(path.parent for path in (ROOT / folder).glob("*/metrics.json"))
    files.extend(run / name for run in runs for name in FILES)
    return all_runs(runs)


def _commands(what: str, files: list[Path]) -> str:
    shown = SHOWN[what or "cake-hf"]
    files.extend((ROOT / shown.folder).rglob("*.py"))
    return command_line(shown)


FILLINGS: dict[str, Callable[[str, list[Path]], str]] = {
    "file": _file,
    "section": _section,
    "results": _results,
    "parity": _parity,
    "commands": _commands,
}
