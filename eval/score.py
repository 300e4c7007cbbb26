"""`python -m eval.score FILE.jsonl`: LongBench's scores of predictions.

A row is `{"dataset", "pred", "answers", "all_classes"}`; what else it has is ignored. Printed are a table and, as the
last line, JSON: `{"per_row": [...], "per_task": {...}, "skipped": [...]}`, with values in 0..1 and null for rows that
could not be scored. Exit code 2 if no row could be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from cake_hf.cli.sheets import Sheet
from eval.scores import BrokenAnswer, MissingSegmenter, score
from eval.tasks import TASKS, UnknownTask, find_task

FAILED = 2


class BrokenRow(ValueError):
    """A row cannot be scored; the message is the reason."""


@dataclass
class Scored:
    """All scores of a file.

    Attributes:
        per_row: the score of each row; None if it was skipped.
        tasks: of each row; empty if it names none.
        reasons: row -> why it was skipped.
    """

    per_row: list[float | None] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def of_task(self, name: str) -> list[float]:
        """Returns the scores of a task's rows."""
        rows = zip(self.tasks, self.per_row, strict=True)
        return [value for task, value in rows if task == name and value is not None]

    @property
    def per_task(self) -> dict[str, float]:
        """Returns the mean of each task that has a score, in the order of the benchmark."""
        found = {name: self.of_task(name) for name in TASKS}
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        skipped = [{"row": row, "reason": reason} for row, reason in self.reasons.items()]
        return {"per_row": self.per_row, "per_task": self.per_task, "skipped": skipped}


def score_lines(lines: Iterable[str]) -> Scored:
    """Scores JSON lines, except for empty ones. A row that cannot be scored is counted, and the rest goes on."""
    scored = Scored()
    for line in lines:
        if not line.strip():
            continue
        name, value = "", None
        try:
            row = _parse(line)
            name = str(row.get("dataset", ""))
            value = _score(row)
        except (BrokenRow, UnknownTask, BrokenAnswer, MissingSegmenter) as error:
            scored.reasons[len(scored.per_row)] = str(error)
        scored.per_row.append(value)
        scored.tasks.append(name)
    return scored


def table(scored: Scored) -> Sheet:
    """Returns the scores of all tasks, in per cent as the benchmark prints them."""
    rows = []
    for name in dict.fromkeys([*(name for name in TASKS if name in scored.tasks), *scored.tasks]):
        values, total = scored.of_task(name), scored.tasks.count(name)
        mean = f"{100 * sum(values) / len(values):.2f}" if values else "-"
        metric = TASKS[name].metric if name in TASKS else "-"
        rows.append((name or "(none)", mean, metric, str(len(values)), str(total - len(values))))
    return Sheet("LongBench scores, per cent", ("<task", "score", "<metric", "rows", "skipped"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.score", description="LongBench's scores of predictions.")
    parser.add_argument("file", type=Path, help='JSON lines of {"dataset", "pred", "answers", "all_classes"}')
    path = parser.parse_args(arguments).file
    try:
        with path.open(encoding="utf-8") as lines:
            scored = score_lines(lines)
    except (OSError, UnicodeDecodeError) as error:
        print(f"The file {path} cannot be read as UTF-8 text: {error}", file=sys.stderr)
        return FAILED
    for row, reason in scored.reasons.items():
        print(f"row {row} skipped: {reason}", file=sys.stderr)
    Console(highlight=False).print(table(scored))
    print(json.dumps(scored.as_dict()))
    return 0 if len(scored.reasons) < len(scored.per_row) else FAILED


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BrokenRow(f"the line is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise BrokenRow("the line is not a JSON object")
    return row


def _score(row: dict[str, Any]) -> float:
    missing = [name for name in ("dataset", "pred", "answers") if name not in row]
    if missing:
        raise BrokenRow(f"the row has no {missing[0]!r}")
    task, prediction = find_task(str(row["dataset"])), row["pred"]
    if not isinstance(prediction, str):
        raise BrokenRow("'pred' is not a text")
    classes = row.get("all_classes")
    return score(
        task, prediction, _texts(row["answers"], "answers"), _texts(classes, "all_classes") if classes else None
    )


def _texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BrokenRow(f"{name!r} is not a list of texts")
    return value


if __name__ == "__main__":
    sys.exit(main())
