"""The report: one self-contained HTML file that can be opened, mailed and kept."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eval.compare import Metrics, ModeMetrics
from eval.config import RunConfig
from eval.tables import COLUMNS, LOGITS, cells, lists, percent, verdict

COLOURS = {
    "plain": "#8a8f98",
    "chunked": "#5b6270",
    "cold": "#e07b39",
    "warm": "#3a7ca5",
    "middle": "#6a994e",
    "faults": "#b00020",
}
BAR, GAP, LABELS, WIDTH = 11, 10, 170, 860

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, td:nth-child(2) { text-align: left; }
.good { background: #6a994e33; } .bad { background: #b0002055; }
.verdict { padding: .8em 1em; border-radius: .4em; font-size: 1.2em; font-weight: 600; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 11px; }
pre { overflow-x: auto; background: #8881; padding: 1em; border-radius: .4em; } li { overflow-wrap: anywhere; }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em; border-radius: .2em; }
"""


def make_page(config: RunConfig, metrics: Metrics, environment: Mapping[str, Any]) -> str:
    """Returns the whole page."""
    good = metrics.exact and bool(metrics.rows)
    model = html.escape(config.model)
    parts = [
        f"<h1>Parity of {model}</h1>",
        f"<p class='verdict {'good' if good else 'bad'}'>{html.escape(verdict(metrics))}</p>",
        f"<p>{metrics.rows} rows of {len(metrics.tasks)} tasks, {len(metrics.skipped)} skipped, {metrics.cut} cut in the "
        f"middle; run {config.digest}.</p>",
        "<p>plain: <code>generate</code> as it comes; chunked: <code>generate(prefill_chunk_size)</code> on a DynamicCache, "
        "which the others must equal bit for bit; cold, warm (in a fresh process), middle (both sides made to meet there) and "
        "faults (reads that go wrong): with a CakeCache.</p>",
        _results(metrics),
        "<p>= single, = chunked: share of rows with the tokens of the single-shot and the chunked run; logits: with the "
        "logits of the chunked run, bit for bit; TTFT: median; hits, loaded: share of full chunks "
        "that the store had, and that came from there.</p>",
        _legend(metrics),
        _section("Time to the first token, seconds (medians)", metrics, lambda mode: mode.ttft, lambda v: f"{v:.3g}"),
        _section("Chunks loaded", metrics, lambda mode: mode.loaded, percent, most=1.0),
        _section("Score, per cent", metrics, lambda mode: mode.score, lambda v: f"{100 * v:.1f}", most=1.0),
        *(_list(title, lines) for title, lines in lists(metrics).items()),
        f"<h2>Settings</h2><pre>{html.escape(json.dumps(config.for_people(), indent=2))}</pre>",
        f"<h2>Environment</h2><pre>{html.escape(json.dumps(environment, indent=2))}</pre>",
    ]
    head = f"<meta charset='utf-8'><title>Parity of {model}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def bars(groups: Mapping[str, Mapping[str, float]], show: Callable[[float], str], most: float | None = None) -> str:
    """Returns horizontal bars as SVG: a group for each task, a bar for each mode.

    Args:
        groups: task -> mode -> value, not negative.
        show: formats a value.
        most: the value of a full bar; the greatest of all by default.
    """
    full = most or max((value for modes in groups.values() for value in modes.values()), default=0.0) or 1.0
    pieces, top = [], 0
    for name, modes in groups.items():
        middle = top + len(modes) * BAR / 2 + 4
        pieces.append(f"<text x='{LABELS - 8}' y='{middle:g}' text-anchor='end'>{html.escape(name)}</text>")
        for mode, value in modes.items():
            pieces.append(_bar(mode, value / full * (WIDTH - LABELS - 60), top, show(value)))
            top += BAR
        top += GAP
    return f"<svg viewBox='0 0 {WIDTH} {max(top, 1)}' width='{WIDTH}' role='img'>{''.join(pieces)}</svg>"


def _bar(mode: str, length: float, top: int, text: str) -> str:
    colour = COLOURS.get(mode, "#888")
    return (
        f"<g><title>{html.escape(mode)}: {html.escape(text)}</title>"
        f"<rect x='{LABELS}' y='{top}' width='{max(length, 0.5):.1f}' height='{BAR - 1}' fill='{colour}'/>"
        f"<text x='{LABELS + length + 4:.1f}' y='{top + BAR - 2}'>{html.escape(text)}</text></g>"
    )


def _results(metrics: Metrics) -> str:
    heading = "".join(f"<th>{html.escape(name)}</th>" for name in ("task", "mode", *COLUMNS))
    rows = [_row(name, mode, figures) for name, task in metrics.tasks.items() for mode, figures in task.modes.items()]
    return f"<h2>Results</h2><table><tr>{heading}</tr>{''.join(rows)}</table>"


def _row(task: str, mode: str, figures: ModeMetrics) -> str:
    texts = cells(figures)
    exact = figures.logits_as_chunked == 1 and not figures.errors
    classes = ["" for _ in texts]
    if mode not in ("plain", "chunked"):
        classes[LOGITS] = "good" if exact else "bad"
    tagged = "".join(f"<td class='{kind}'>{html.escape(text)}</td>" for kind, text in zip(classes, texts, strict=True))
    return f"<tr><td>{html.escape(task)}</td><td>{html.escape(mode)}</td>{tagged}</tr>"


def _legend(metrics: Metrics) -> str:
    modes = dict.fromkeys(mode for task in metrics.tasks.values() for mode in task.modes)
    keys = (
        f"<span class='key' style='background:{COLOURS.get(mode, '#888')}'></span>{html.escape(mode)}" for mode in modes
    )
    return f"<p>{''.join(keys)}</p>"


def _section(
    title: str,
    metrics: Metrics,
    value: Callable[[ModeMetrics], float | None],
    show: Callable[[float], str],
    most: float | None = None,
) -> str:
    """Returns a heading and bars of one figure, if any mode has it."""
    groups = {
        name: {mode: found for mode, figures in task.modes.items() if (found := value(figures)) is not None}
        for name, task in metrics.tasks.items()
    }
    groups = {name: modes for name, modes in groups.items() if modes}
    return f"<h2>{html.escape(title)}</h2>{bars(groups, show, most)}" if groups else ""


def _list(title: str, lines: Sequence[str] | Iterable[str]) -> str:
    entries = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>{html.escape(title)}</h2><ul>{entries}</ul>" if entries else ""
