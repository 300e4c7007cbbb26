"""Plots of one prompt, for notebooks and papers: the timeline of its chunks, the time of each way of answering, the split.

matplotlib is an extra (`plots`) and is imported only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from cake_hf.errors import CakeError
from cake_hf.report import Report, Span
from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.planner import plan
from cake_hf.util.sizes import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOTH, COMPUTE, LOAD, LIMIT = "#2a9d4b", "#e07b39", "#3a7ca5", "#222222"

SHADES = {
    "computed": (COMPUTE, "#eb9a66"),
    "loaded": (LOAD, "#639bc0"),
    "refined": ("#7a5ea8", "#a08bc4"),
    "shared": ("#5b9a68", "#84b58e"),
    "preempted": ("#9aa0a6", "#b3b8bd"),
    "superseded": ("#9aa0a6", "#b3b8bd"),
    "not usable": ("#b00020", "#c43a52"),
}
"""Two colours for each outcome, so that neighbouring chunks can be told apart."""

BARS = ("#8a8f98", COMPUTE, BOTH, LOAD, "#8e6bbf", "#c2559d")
"""Colours of the bars of `plot_ttft`, in turn."""

NARROW = 0.012
"""The fraction of the width below which a chunk's number does not fit into its bar."""

DPI = 100


def require_matplotlib() -> None:
    """Checks for matplotlib before any work is done whose result could not be drawn.

    Raises:
        CakeError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise CakeError("Plots need matplotlib; install it with: pip install 'cake-hf[plots]'")


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure independent of pyplot: no global state changes, no window can open, and a notebook still shows it.

    Args:
        width, height: in inches.

    Raises:
        CakeError: matplotlib is not installed.
    """
    require_matplotlib()
    figure: Figure = _picture_class()(figsize=(width, height), layout="constrained")
    return figure


def plot_timeline(report: Report, title: str = "") -> Figure:
    """Plots which thread handled each chunk, and from when to when: one lane per thread.

    Args:
        report: the report of a `CakeCache`.
        title: by default a short summary of the report.

    Returns:
        A matplotlib figure; a notebook shows it as a cell's value, and `savefig` writes it to a file.

    Raises:
        CakeError: matplotlib is not installed, or the report has no timeline; the report's reason says why.
    """
    seconds = max((span.end for span in report.timeline), default=0.0)
    if not seconds:
        raise CakeError(f"There is no timeline: {report.reason or 'no prompt was restored with this cache yet'}.")
    figure = new_figure(10, 1.4 + 0.5 * len(report.lanes()))
    draw_lanes(figure, report.timeline, seconds)
    counts = f"{report.chunks_loaded} chunks loaded, {report.chunks_computed} computed"
    figure.suptitle(title or f"{report.tokens:,} tokens: {counts}", fontsize=11, fontweight="bold")
    return figure


def plot_ttft(seconds: Mapping[str, float], title: str = "Time to the first token") -> Figure:
    """Plots the time to the first token: one bar for each way of answering, in the given order from top to bottom.

    Args:
        seconds: name -> time, e.g. `{"cold": 1.9, "warm": 0.1}`.
        title: the title of the figure.

    Returns:
        A matplotlib figure, as `plot_timeline` does.

    Raises:
        CakeError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not seconds:
        raise ValueError("There are no times to be drawn; pass at least one, such as {'warm': 0.1}.")
    figure = new_figure(8, 1.1 + 0.42 * len(seconds))
    panel = figure.subplots()
    names, values = list(seconds), list(seconds.values())
    colours = [BARS[number % len(BARS)] for number in range(len(names))]
    bars = panel.barh(names, values, height=0.66, color=colours)
    panel.bar_label(bars, [seconds_text(value) for value in values], padding=4, fontsize=9)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlabel("seconds")
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure


def plot_split(costs: Costs, chunks: int, reports: Mapping[str, Report] | None = None, title: str = "") -> Figure:
    """Plots the predicted time of each split of a stored prompt: the first m chunks are computed, the others loaded.

    Both sides run at the same time, so a split takes as long as the slower side; the best split is about where the lines cross.

    Args:
        costs: the costs of computing and of loading, both known.
        chunks: the number of chunks of the prompt, all stored.
        reports: name -> report of a run, drawn at its meeting point and the time at which its last chunk was available.
        title: the title of the figure.

    Returns:
        A matplotlib figure, as `plot_timeline` does.

    Raises:
        CakeError: matplotlib is not installed.
        ValueError: a cost is not known, or there are no chunks.
    """
    best = plan(costs, [True] * chunks)
    if costs.compute is None or costs.load is None or best.split is None or chunks < 1:
        raise ValueError("A split curve needs the costs of computing and of loading, and at least one chunk.")
    load = costs.load
    splits = range(chunks + 1)
    front = list(accumulate((costs.compute.seconds(index) for index in range(chunks)), initial=0.0))
    figure = new_figure(8, 4.2)
    panel = figure.subplots()
    panel.plot(splits, front, "--", color=COMPUTE, lw=1.6, label="computing the front")
    panel.plot(splits, [load.finish(chunks - m) for m in splits], "--", color=LOAD, lw=1.6, label="loading the back")
    panel.plot(splits, best.curve, color=BOTH, lw=2.6, label="both at once")
    panel.plot(best.split, best.curve[best.split], "o", color=BOTH, ms=9)
    panel.annotate(
        f"best: compute {best.split}, load {chunks - best.split}", (best.split, best.curve[best.split]),
        xytext=(0, -16), textcoords="offset points", ha="center", fontsize=9, color=BOTH,
    )  # fmt: skip
    for marker, (name, report) in zip("XDPsv^" * len(reports or ()), (reports or {}).items(), strict=False):
        panel.plot(report.chunks_computed, prefix_seconds(report), marker, color=LIMIT, ms=8, label=name, clip_on=False)
    panel.set(xlabel="chunks that are computed", ylabel="seconds until all chunks are there", xlim=(0, chunks))
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="x", integer=True)
    panel.margins(y=0.12)
    panel.grid(True, color="#e4e4e4", lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title or f"Where to meet: {chunks} chunks", fontsize=11, fontweight="bold")
    return figure


def prefix_seconds(report: Report) -> float:
    """Returns the time at which the last full chunk was available; the prompt's suffix comes after it."""
    counted = (span for span in report.timeline if span.chunk >= 0 and span.outcome != "superseded")
    return max((span.end for span in counted), default=0.0)


def draw_lanes(figure: Figure, spans: Sequence[Span], seconds: float) -> Axes:
    """Draws a panel with one lane per actor, the computing thread at the top, and a legend of the colours below.

    Args:
        figure: an empty figure.
        spans: the spans of all actors.
        seconds: the time at which the first token was available.
    """
    from matplotlib.patches import Patch

    lanes = sorted({span.actor for span in spans})
    panel = figure.subplots()
    for height, actor in enumerate(reversed(lanes)):
        _draw_lane(panel, height, [span for span in spans if span.actor == actor], seconds)
    panel.axvline(seconds, color=BOTH, lw=2)
    panel.annotate(
        "first token", (seconds, 1.0), xycoords=("data", "axes fraction"), xytext=(-4, 3),
        textcoords="offset points", ha="right", va="bottom", fontsize=9, color=BOTH,
    )  # fmt: skip
    panel.set(xlim=(0, seconds * 1.005), ylim=(-0.6, len(lanes) - 0.4))
    panel.set_xlabel("seconds since the prompt came to the cache")
    panel.set_yticks(range(len(lanes)), [_lane_name(actor) for actor in reversed(lanes)])
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    found = {_shade_of(span) for span in spans}
    patches = [Patch(color=SHADES[name][0], label=name) for name in SHADES if name in found]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(SHADES), frameon=False, fontsize=9)
    return panel


def _draw_lane(panel: Axes, height: int, spans: Sequence[Span], total: float) -> None:
    for order, span in enumerate(sorted(spans, key=lambda span: span.start)):
        colour, width = SHADES[_shade_of(span)][order % 2], span.end - span.start
        panel.barh(height, width, left=span.start, height=0.72, color=colour, edgecolor="white", linewidth=0.5)
        is_tail = span.chunk < 0
        label = str(span.chunk) if not is_tail else "last piece" if width / total > 6 * NARROW else ""
        if width / total > NARROW:
            middle = (span.start + span.end) / 2
            panel.text(middle, height, label, ha="center", va="center", fontsize=8, color="white")


def _shade_of(span: Span) -> str:
    """Returns the name of a span's colours. A forward with layer-wise pipelining counts as computed."""
    outcome = "computed" if span.outcome == "gated" else span.outcome
    return outcome if outcome in SHADES else "not usable"


def _lane_name(actor: str) -> str:
    return "main thread" if actor == "compute" else actor.replace("load-", "loader ")


@cache
def _picture_class() -> Any:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that notebooks show: they need a `_repr_png_`, which a plain figure has only if pyplot is in use."""

        def _repr_png_(self) -> bytes:
            raw = BytesIO()
            self.savefig(raw, format="png", dpi=DPI)
            return raw.getvalue()

    return Picture
