"""The results of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from cake_hf.cli.console import console
from cake_hf.cli.sheets import Sheet
from eval.compare import Metrics, ModeMetrics

SHOWN = 20
"""The most lines of a list; metrics.json and the report have all of them."""

COLUMNS = ("rows", "= single", "= chunked", "logits", "score", "TTFT, s", "hits", "loaded")
LOGITS = COLUMNS.index("logits")


def cells(mode: ModeMetrics) -> list[str]:
    """Returns a mode's figures under `COLUMNS`."""
    return [
        f"{mode.rows}" + (f" of {mode.rows + mode.errors}" if mode.errors else ""),
        percent(mode.tokens_as_single),
        percent(mode.tokens_as_chunked),
        percent(mode.logits_as_chunked),
        "-" if mode.score is None else f"{100 * mode.score:.2f}",
        f"{mode.ttft:.3f}",
        *("-" if share is None else percent(share) for share in (mode.hit_rate, mode.loaded)),
    ]


def percent(share: float) -> str:
    """Rounds down, so that 100 % is all."""
    return f"{int(100 * share + 1e-9)} %"


def results_table(metrics: Metrics) -> Sheet:
    """Returns all modes of all tasks. Tokens are compared with the single-shot and the chunked run, logits with the latter."""
    rows: list[Sequence[str | Text]] = []
    for name, task in metrics.tasks.items():
        rows.append((Text(name, style="bold"), *("" for _ in COLUMNS)))
        rows += [(f"  {mode}", *cells(figures)) for mode, figures in task.modes.items()]
    return Sheet("Parity", ("<task, mode", *COLUMNS), rows)


def verdict(metrics: Metrics) -> str:
    """Returns the verdict as one sentence."""
    if not metrics.rows:
        return "Nothing could be run."
    if not metrics.exact:
        return f"Exactness is BROKEN, in {len(metrics.broken)} places."
    if not metrics.loaded_anything:
        return f"All equal on {metrics.rows} rows, but nothing was loaded from the store, so this shows little."
    return f"Exact: {metrics.rows} rows; every restored run gave the tokens and, bit for bit, the logits of the chunked run."


def print_results(metrics: Metrics, folder: Path) -> None:
    """Prints table, lists and verdict."""
    if metrics.tasks:
        console.print(results_table(metrics))
    for title, lines in lists(metrics).items():
        if lines:
            console.print(f"\n{title}", style="bold")
            for line in lines[:SHOWN]:
                console.print(Text(f"  {line}"), soft_wrap=True)
            if len(lines) > SHOWN:
                console.print(f"  ... and {len(lines) - SHOWN} more")
    good = metrics.exact and bool(metrics.rows)
    console.print(Text(f"\n{verdict(metrics)}", style="bold green" if good else "bold red"))
    console.print(Text(f"The report: {folder / 'report.html'}"), soft_wrap=True)


def lists(metrics: Metrics) -> dict[str, list[str]]:
    """Returns what there is to say beside the figures, by heading."""
    return {
        "Broken": metrics.broken,
        "Other tokens than the single-shot run": list(_differences(metrics)),
        "Skipped": _pairs(metrics.skipped),
        "Not scored": _pairs(metrics.unscored),
        "Notes": _pairs(metrics.notes),
    }


def _differences(metrics: Metrics) -> Iterator[str]:
    for found in metrics.differences:
        place = f"from new token {found.position} on; the best logit led by {found.margin:.4g}"
        yield f"{found.task}/{found.row} {found.mode}: {place}"


def _pairs(entries: Mapping[str, str]) -> list[str]:
    return [f"{name}: {text}" for name, text in entries.items()]
