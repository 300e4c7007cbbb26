"""What the library can say, taken from its sources: so that a page about messages can be held against them.

Where a message has a value in it, whatever it is, stands "...".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cake_hf

SOURCE = Path(cake_hf.__path__[0])
GAP = "..."
LOGGED = {"warning", "error", "exception", "critical"}
RAISED = {"CakeError", "StoreError", "UnsupportedModel", "ForeignModel", "UnfitImages", "DeadlineExceeded"}
NAMES_WHAT_FAILED = {"_faults", "_told", "tell"}
"""Called with the begin of a message, to which the cause is added."""
NOT_FOR_USERS = ("testing",)
"""Where errors are made on purpose."""
FEWEST_LETTERS = 8
"""A message with fewer letters of its own is put together from others, which are looked at where they are made."""


@cache
def sources(*, for_users: bool = False) -> dict[str, ast.Module]:
    """All modules by their path in the package; `for_users` leaves out those whose errors no user meets."""
    paths = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if not (for_users and name.startswith(NOT_FOR_USERS))
    }


def template(node: ast.AST) -> str:
    """A string or f-string, with a gap for each value; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[sdr]", GAP, node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    else:
        return ""
    return " ".join(text.split())


def every_text() -> set[str]:
    """All strings of the package."""
    return {template(node) for module in sources().values() for node in ast.walk(module)} - {""}


def logged(module: ast.Module) -> Iterator[str]:
    """What goes to the log as a warning or worse."""
    for call in _calls(module):
        name = _name(call.func)
        if name in LOGGED and isinstance(call.func, ast.Attribute) and _name(call.func.value) == "logger":
            yield template(call.args[0])
        elif name == "tell" and len(call.args) == 3:  # `FaultLog.tell(kind, message, error)`
            yield template(call.args[1])


def raised(module: ast.Module) -> Iterator[str]:
    """The sentences of our own errors; of those that are put together, their begin."""
    for call in _calls(module):
        name = _name(call.func)
        if call.args and (name in RAISED or (name in NAMES_WHAT_FAILED and len(call.args) == 1)):
            yield template(call.args[0])


def refusals(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields the code and the text of each `Refusal` that is made."""
    for call in _calls(module):
        if _name(call.func) == "Refusal" and len(call.args) == 2 and isinstance(call.args[0], ast.Constant):
            yield str(call.args[0].value), template(call.args[1])


def mismatches(module: ast.Module) -> Iterator[str]:
    """Yields the mismatch reasons of packs: what functions named `why_not` return."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name == "why_not":
            steps = (step for step in ast.walk(node) if isinstance(step, ast.Return))
            yield from (text for step in steps for text in _texts(step.value))


def worth_a_line(texts: Iterator[str]) -> list[str]:
    """Those that say something by themselves."""
    return [text for text in texts if sum(letter.isalpha() for letter in text) >= FEWEST_LETTERS]


def _calls(module: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(module) if isinstance(node, ast.Call))


def _name(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _texts(value: ast.AST | None) -> Iterator[str]:
    """The strings that a value may be: itself, either side of a choice, or what is left out by multiplying with False."""
    if isinstance(value, ast.IfExp):
        yield from _texts(value.body)
        yield from _texts(value.orelse)
    elif isinstance(value, ast.BoolOp):
        for one in value.values:
            yield from _texts(one)
    elif isinstance(value, ast.BinOp):
        yield from _texts(value.left)
    elif value is not None:
        yield template(value)
