"""The chart of a result: seconds to the first token, by kind of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cake_hf.plots import BARS, LIMIT, new_figure
from cake_hf.plots import COMPUTE as COMPUTE_COLOUR
from cake_hf.plots import LOAD as LOAD_COLOUR
from cake_hf.util.sizes import count_text
from eval.walk.tables import longest
from eval.walk.taken import COMPUTE, COPY, LOAD
from eval.walk.ways import CHUNKED, COLD, COPIED, NEW, RECIPE, SINGLE, TORCH_LOAD, WAYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {LOAD: LOAD_COLOUR, COPY: BARS[0], COMPUTE: COMPUTE_COLOUR}
"""Kind -> colour, in the order in which the time passes: KV is brought back or copied, then the question is computed."""

MEANING = {
    COMPUTE: "compute: the model runs",
    LOAD: "load: KV comes from the disk",
    COPY: "copy: KV is copied in memory",
}

FIRST = (SINGLE, CHUNKED, COLD)
LATER = (RECIPE, COPIED, TORCH_LOAD, NEW)

IN_MEMORY = (RECIPE, COPIED)
"""The ways whose KV is in memory already; they count from the question on."""
ROOM = 1.16
"""Space for the figure behind a bar, as a share of the longest bar."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Plots the longest document, as SVG: text as text, a background of its own so that it can be read on any.

    Raises:
        CakeError: matplotlib is not installed.
    """
    document = longest(result)
    figure = new_figure(8.6, 4.4)
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "walk", "font.family": "sans-serif", "text.color": LIMIT}):
        upper, lower = figure.subplots(2, height_ratios=(len(FIRST), len(LATER)))
        _panel(upper, document, FIRST, "The first question about a document")
        _panel(lower, document, LATER, "A question when its KV is in memory or on the disk (another scale)")
        lower.set_xlabel("seconds to the first token, median")
        handles = [_patch(COLOURS[kind]) for kind in MEANING]
        figure.legend(handles, list(MEANING.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.suptitle(_title(result, document), fontsize=11, fontweight="bold")
        figure.savefig(
            path, format="svg", facecolor="white", metadata={"Date": None, "Title": _title(result, document)}
        )
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def _title(result: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    threads = count_text(result["threads"], "CPU thread")
    return f"{result['model']}, {result['dtype']}: a document of {document['tokens']:,} tokens, {threads}"


def _panel(panel: Axes, document: Mapping[str, Any], ways: Sequence[str], title: str) -> None:
    longest_bar = 0.0
    for height, way in enumerate(ways):
        parts, end = parts_of(document, way), 0.0
        for kind, colour in COLOURS.items():
            panel.barh(height, parts[kind], left=end, height=0.66, color=colour)
            end += parts[kind]
        panel.annotate(
            shown(end), (end, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=LIMIT
        )
        longest_bar = max(longest_bar, end)
    panel.set_yticks(range(len(ways)), [WAYS[way] for way in ways])
    panel.invert_yaxis()
    panel.set_xlim(0, longest_bar * ROOM)
    panel.set_title(title, fontsize=10, loc="left")
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def shown(seconds: float) -> str:
    """Formats a bar's figure."""
    return f"{seconds:.1f} s" if seconds >= 9.95 else f"{seconds:.2f} s"


def parts_of(document: Mapping[str, Any], way: str) -> dict[str, float]:
    """Returns seconds by kind, each a median, of the first question."""
    found = [one for one in document["taken"] if (one["way"], one["question"]) == (way, 0)]
    steps: Sequence[str] = ("asked",) if way in IN_MEMORY else ("prepared", "asked")
    return {kind: median(sum(one[step].get(kind, 0.0) for step in steps) for one in found) for kind in COLOURS}


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)
