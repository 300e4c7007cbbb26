"""The result as tables, in Markdown; the documentation's page has them between two marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.shootout.judge import Outcome
from benchmarks.shootout.speed import COLD, DISK, FOUR, PACES, PLAIN, WARM
from benchmarks.shootout.systems import SYSTEMS
from benchmarks.shootout.trials import CROSSED, TRIALS

BEGIN, END = "<!-- shootout: begin -->", "<!-- shootout: end -->"

WORDS = {
    Outcome.SAME: "same",
    Outcome.WRONG: "**wrong**",
    Outcome.ERROR: "error",
    Outcome.HANG: "**hang**",
    Outcome.NOT_APPLICABLE: "-",
}
LONGEST = 200


def page(result: Mapping[str, Any]) -> str:
    """Returns all tables."""
    parts = {
        "What the user gets": [_run(result.get("trials_run")), _cells(result)],
        "How long the first token takes": [_run(result.get("speed_run")), _speed(result)],
        "What could not run here": [_unable(result)],
        "What was seen": [_details(result)],
        "How each was used": ["Defaults, except for what is said here.", _use()],
    }
    return "\n\n".join("\n\n".join([f"### {title}", *filter(None, texts)]) for title, texts in parts.items())


def write(result: Mapping[str, Any], file: Path) -> None:
    """Puts the tables between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    text = file.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{file} has no line {BEGIN} and {END} to write between.")
    inside = f"{BEGIN}\n{page(result)}\n{END}"
    file.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: inside, text, flags=re.DOTALL), encoding="utf-8")


def _run(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return ""
    machine = run["machine"]
    return (
        f"Measured on {run['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, no GPU; "
        f"{run['model']}, documents of {run['tokens']:,} tokens ({run['documents']}), {run['threads']} computing thread"
        f"{'s' if run['threads'] > 1 else ''}, {_counted(run)}."
    )


def _counted(run: Mapping[str, Any]) -> str:
    return f"{run['new']} new tokens, greedy" if "new" in run else f"medians of {run['rounds']} rounds, in turns"


def _cells(result: Mapping[str, Any]) -> str:
    cells = result["cells"]
    names = [name for name in SYSTEMS if cells.get(name)]
    rows = [["trial", *names], ["---"] * (len(names) + 1)]
    for trial, (title, _) in TRIALS.items():
        rows.append([title, *(_cell(cells[name].get(trial)) for name in names)])
    return _table(rows)


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    word = WORDS[Outcome(cell["outcome"])]
    if cell["note"] == CROSSED:
        return f"{word}, **{CROSSED}**"
    return word if cell["outcome"] != Outcome.SAME or cell["loaded"] != 0 else f"{word}, computed"


def _speed(result: Mapping[str, Any]) -> str:
    speed = result.get("speed") or {}
    heads = [
        "",
        "alone, s",
        "saving",
        "memory",
        "disk",
        *(f"{pace} MB/s" for pace in PACES),
        "4 questions",
        "MB on disk",
    ]
    rows = [heads, ["---"] * len(heads)]
    for name, found in speed.items():
        rounds = [one for one in found.get("rounds", ()) if PLAIN in one]
        if rounds:
            ratios = [_ratio(rounds, kind) for kind in (COLD, WARM, DISK, *map(str, PACES), FOUR)]
            plain = median(one[PLAIN] for one in rounds)
            rows.append([name, f"{plain:.2f}", *ratios, f"{found['nbytes'] / 1e6:.0f}"])
    return _table(rows) if len(rows) > 2 else "The speed has not been measured in this run."


def _ratio(rounds: list[dict[str, float]], kind: str) -> str:
    """Returns time over the system's own without a cache, round by round; four questions over four such runs."""
    share = 4 if kind == FOUR else 1
    found = [one[kind] / one[PLAIN] / share for one in rounds if kind in one]
    return f"{median(found):.2f}" if found else "-"


def _unable(result: Mapping[str, Any]) -> str:
    rows = [["system", "why it has no column"], ["---", "---"]]
    rows += [[name, _short(reason)] for name, reason in result["unable"].items()]
    return _table(rows) if len(rows) > 2 else "All systems ran."


def _details(result: Mapping[str, Any]) -> str:
    """Returns what was seen in each cell that is not simply the same, with the command that shows it."""
    rows = [["system, trial", "seen", "command"], ["---"] * 3]
    for name, cells in result["cells"].items():
        for trial, cell in cells.items():
            if cell["outcome"] == Outcome.SAME and cell["note"] != CROSSED:
                continue
            told = _short("; ".join(filter(None, [cell["note"], *dict.fromkeys(cell["lines"])])))
            rows.append([f"{name}, {TRIALS[trial][0]}", told, f"`--system {name} --trial {trial}`"])
    return _table(rows)


def _use() -> str:
    rows = [["system", "version", "use", "options that would help"], ["---"] * 4]
    rows += [[spec.name, spec.version, spec.how, spec.options or "-"] for spec in SYSTEMS.values()]
    return _table(rows)


def _short(text: str) -> str:
    plain = " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'").split())
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]} ..."


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
