"""Writes docs/faults.md, "What can go wrong, and what happens then", from the tests that show it.

A row is a test that is marked `@pytest.mark.fault("Area", "what goes wrong", "what happens then")`. Run it after such a mark
was changed; a test notices when the page is out of date.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "faults.md"
AREAS = ("Model", "Prompt", "KV", "Stores", "Files", "Time and bounds", "Processes", "Secrets")
"""In the order of the page."""

INTRODUCTION = """# What can go wrong, and what happens then

Each row is shown by the test beside it. The page is written by `python scripts/faults.py` from these tests.
"""


class Fault(NamedTuple):
    """A row."""

    area: str
    what: str
    then: str
    test: str


def faults_of(source: str, file: str) -> Iterator[Fault]:
    """The marked tests of one file.

    Raises:
        ValueError: a mark has not three texts, or an area of its own.
    """
    for node in ast.walk(ast.parse(source)):
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                texts = [ast.literal_eval(argument) for argument in mark.args]
                if len(texts) != 3 or texts[0] not in AREAS:
                    raise ValueError(f"{file}: a fault has an area ({', '.join(AREAS)}) and two texts, not {texts}.")
                yield Fault(*texts, test=f"{file}::{node.name}")  # type: ignore[attr-defined]  # only functions and classes have marks


def page() -> str:
    """The whole page, as Markdown."""
    rows: dict[str, list[Fault]] = defaultdict(list)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for fault in faults_of(path.read_text(encoding="utf-8"), path.name):
            rows[fault.area].append(fault)
    return INTRODUCTION + "".join(_table(area, rows[area]) for area in AREAS if rows[area])


def _table(area: str, faults: list[Fault]) -> str:
    lines = [f"| {what} | {then} | `{test}` |" for _, what, then, test in faults]
    return "\n".join(
        ["", f"## {area}", "", "| what goes wrong | what happens then | shown by |", "|---|---|---|", *lines, ""]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
