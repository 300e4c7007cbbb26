"""One question about one document, from any benchmark; and the parsers of the benchmarks' own schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.tasks import LONGBENCH_V2, SCBENCH, Task

LETTERS = "ABCD"


class BrokenRow(ValueError):
    """A row does not match its benchmark's schema; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """A question about a document.

    Attributes:
        task: its name.
        id: unique within the task.
        document: the long text; rows with the same one share its KV.
        question: empty if the task has none (summaries).
        answers: each of them is right.
        classes: of the task, if it has classes.
        history: (question, answer) of the turns before this one.
    """

    task: str
    id: str
    document: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    history: tuple[tuple[str, str], ...] = ()


def parse_record(task: Task, record: object, position: int) -> list[Row]:
    """Returns the rows in one record of a data set: one, or one per turn.

    Args:
        task: the one that the record is read as.
        record: in the schema of the task's suite.
        position: of the record, which names it if it has no id.

    Raises:
        BrokenRow: the record lacks something, or a value has the wrong type.
    """
    if not isinstance(record, Mapping):
        raise BrokenRow("it is not a JSON object")
    if task.suite == SCBENCH:
        return _turns(task, record, position)
    return [_multiple_choice(task, record, position) if task.suite == LONGBENCH_V2 else _plain(task, record, position)]


def _plain(task: Task, record: Mapping[str, Any], position: int) -> Row:
    """Parses LongBench: `_id, dataset, language, input, context, answers, all_classes, length`."""
    named = record.get("dataset", task.name)
    if named != task.name:
        raise BrokenRow(f"it says that it belongs to {named!r}")
    classes = record.get("all_classes")
    return Row(
        task.name,
        _id(record, position),
        _text(record, "context"),
        _text(record, "input"),
        _texts(record, "answers"),
        None if classes is None else _texts(record, "all_classes"),
    )


def _multiple_choice(task: Task, record: Mapping[str, Any], position: int) -> Row:
    """Parses LongBench v2: `_id, domain, ..., question, choice_A .. choice_D, answer, context`."""
    choices = [f"({letter}) {_text(record, f'choice_{letter}').strip()}" for letter in LETTERS]
    answer = _text(record, "answer")
    if answer not in LETTERS or len(answer) != 1:
        raise BrokenRow(f"its answer {answer!r} is none of {', '.join(LETTERS)}")
    question = "\n".join([_text(record, "question").strip(), *choices])
    return Row(task.name, _id(record, position), _text(record, "context"), question, (answer,))


def _turns(task: Task, record: Mapping[str, Any], position: int) -> list[Row]:
    """Parses SCBench: `id, context, multi_turns: [{input, answer, ...}]`, each turn a row.

    A row's history has the turns before its own with the right answers, as the benchmark runs them; so no row depends on what
    the model wrote before.
    """
    turns = record.get("multi_turns")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BrokenRow("it has no 'multi_turns'")
    document, name = _text(record, "context"), _id(record, position)
    rows: list[Row] = []
    history: tuple[tuple[str, str], ...] = ()
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise BrokenRow(f"turn {number} is not a JSON object")
        question, answers = _question(turn), _answers(turn)
        rows.append(Row(task.name, f"{name}/{number}", document, question, answers, history=history))
        history = (*history, (question, answers[0]))
    return rows


def _question(turn: Mapping[str, Any]) -> str:
    options = turn.get("options")
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options or (), strict=False)]
    return "\n".join([_text(turn, "input"), *lines])


def _answers(turn: Mapping[str, Any]) -> tuple[str, ...]:
    found = turn.get("answer")
    answers = tuple(str(item) for item in found) if isinstance(found, (list, tuple)) else (str(found),)
    if found is None or not answers:
        raise BrokenRow("a turn has no 'answer'")
    return answers


def _id(record: Mapping[str, Any], position: int) -> str:
    found = record.get("_id", record.get("id"))
    return str(position) if found is None else str(found)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise BrokenRow(f"its {name!r} is not a text" if name in record else f"it has no {name!r}")
    return value


def _texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = record.get(name)
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise BrokenRow(f"its {name!r} is not a list of texts" if name in record else f"it has no {name!r}")
    return tuple(values)
