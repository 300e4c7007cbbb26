"""The rows of a run as a summary, and the summary as the table of docs/methods.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from cake_hf.util.sizes import bytes_text, count_text
from eval.methods.contestants import FULL

SECONDS = ("compute_seconds", "restore_seconds", "press_seconds", "question_seconds", "token_seconds")


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns means and medians by method, each over the rows that it has run, beside the full KV's score of those rows."""
    methods = list(dict.fromkeys(line["method"] for line in lines))
    full = [line for line in lines if line["method"] == FULL]
    first = full[0]
    return {
        **{name: first[name] for name in ("model", "dtype", "threads", "machine")},
        "rows": len(full),
        "tasks": {task: sum(line["task"] == task for line in full) for task in sorted({line["task"] for line in full})},
        "tokens": round(mean(line["tokens"] for line in full)),
        "bytes": round(mean(line["bytes"] for line in full)),
        "methods": {name: _figures([line for line in lines if line["method"] == name], full) for name in methods},
    }


def _figures(lines: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = {(line["task"], line["row"]) for line in lines}
    errors = [line["error"] for line in lines if line["error"] is not None]
    return {
        "rows": len(lines),
        "score": mean(_by_task(lines).values()),
        "full_score": mean(_by_task([line for line in full if (line["task"], line["row"]) in rows]).values()),
        "scores": _by_task(lines),
        "share": mean(line["share"] for line in lines),
        "error": mean(errors) if errors else None,
        **{name: _median([line[name] for line in lines if line[name] is not None]) for name in SECONDS},
    }


def _median(found: Sequence[float]) -> float | None:
    """Returns the median; None of nothing, as of the further tokens of answers with one token."""
    return median(found) if found else None


def _by_task(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    tasks = sorted({line["task"] for line in lines})
    return {task: mean(line["score"] for line in lines if line["task"] == task) for task in tasks}


def page(result: Mapping[str, Any]) -> str:
    """Returns the table as Markdown."""
    tasks = list(result["tasks"])
    headings = ["method", "rows", "score", "full KV", *tasks, "KV", "error", "TTFT", "TPOT", "saved"]
    rows = [_cells(name, found, tasks) for name, found in result["methods"].items()]
    counts = ", ".join(f"{task} {count}" for task, count in result["tasks"].items())
    machine = f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
    return "\n".join(
        [
            f"{result['model']}, {result['dtype']}, {result['rows']} rows of LongBench ({counts}), {result['tokens']:,} "
            f"tokens of document in the mean, {bytes_text(result['bytes'])} of KV. {machine}; "
            f"{count_text(result['threads'], 'thread')}; seconds are those of the processor.",
            "",
            *markdown(headings, rows),
        ]
    )


def _cells(name: str, found: Mapping[str, Any], tasks: Iterable[str]) -> list[str]:
    after = found["press_seconds"] + found["question_seconds"]
    return [
        name,
        str(found["rows"]),
        f"{100 * found['score']:.1f}",
        f"{100 * found['full_score']:.1f}",
        *(f"{100 * found['scores'][task]:.1f}" if task in found["scores"] else "-" for task in tasks),
        f"{100 * found['share']:.0f} %",
        "-" if found["error"] is None else f"{found['error']:.3f}",
        f"{found['restore_seconds'] + after:.2f} s",
        "-" if found["token_seconds"] is None else f"{1000 * found['token_seconds']:.0f} ms",
        f"{found['compute_seconds'] - found['restore_seconds']:.1f} of {found['compute_seconds'] + after:.1f} s",
    ]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown; all columns but the first are aligned on the right."""
    line = ["---", *["---:"] * (len(headings) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, line, *rows)]


def fill(path: Path, text: str, command: str = "eval.methods") -> None:
    """Puts a table between the marks of the command that made it in a page.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {command} writes from here -->", "<!-- to here -->"
    before, mark, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{path} has no place for {command}.")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
