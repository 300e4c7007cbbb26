"""The wording of a row: templates, from our own file or the user's, filled in as messages."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.data.rows import Row
from eval.tasks import find_task

OWN_PROMPTS = Path(__file__).parent / "prompts.yaml"


class BrokenPrompts(ValueError):
    """A file of templates cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Template:
    """The wording of a task.

    Attributes:
        first: has `{context}`, and `{input}` if the task has questions.
        next: of later turns; has `{input}` alone.
    """

    first: str
    next: str = "{input}"

    def messages(self, row: Row) -> list[str]:
        """Returns the messages in turn: question, answer, question, ...; the last one is the open question."""
        asked = [question for question, _ in row.history] + [row.question]
        said = [self.first.format(context=row.document, input=asked[0])]
        for (_, answer), question in zip(row.history, asked[1:], strict=True):
            said += [answer, self.next.format(input=question)]
        return said


def load_templates(path: Path | None = None) -> dict[str, Template]:
    """Loads the templates of all tasks: our own, and over them those of a file.

    Raises:
        BrokenPrompts: the file is not readable, names an unknown task, or uses other placeholders.
    """
    templates = _read(OWN_PROMPTS)
    return templates | _read(path) if path is not None else templates


def _read(path: Path) -> dict[str, Template]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BrokenPrompts(f"The prompts {path} cannot be read: {error}") from error
    if not isinstance(entries, Mapping):
        raise BrokenPrompts(f"The prompts {path} are no mapping of tasks to templates; see {OWN_PROMPTS.name}.")
    # Names that start with an underscore only exist to be referred to.
    return {name: _template(path, name, entry) for name, entry in entries.items() if not str(name).startswith("_")}


def _template(path: Path, name: str, entry: Any) -> Template:
    find_task(name)
    parts = entry if isinstance(entry, Mapping) else {"first": entry}
    if not set(parts) <= {"first", "next"} or "first" not in parts:
        raise BrokenPrompts(f"The prompt of {name!r} in {path} has {sorted(parts)}; it needs first, and may have next.")
    _check(path, name, parts["first"], needed={"context"}, allowed={"context", "input"})
    if "next" in parts:
        _check(path, name, parts["next"], needed={"input"}, allowed={"input"})
    return Template(**parts)


def _check(path: Path, name: str, text: object, needed: set[str], allowed: set[str]) -> None:
    if not isinstance(text, str):
        raise BrokenPrompts(f"The prompt of {name!r} in {path} is not a text.")
    try:
        found = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise BrokenPrompts(f"The prompt of {name!r} in {path}: {error}; write a literal brace twice.") from error
    if not needed <= found <= allowed:
        raise BrokenPrompts(
            f"The prompt of {name!r} in {path} has the placeholders {sorted(found)}; it needs {sorted(needed)} and may have "
            f"{sorted(allowed)}. A literal brace is written twice."
        )
