"""Pictures of one prompt: what is drawn is what was measured, and a notebook can show it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import cake_hf
from cake_hf import CakeError, Report, plots
from cake_hf.report import Span
from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost

TIMELINE = [
    Span("compute", 0, 0.0, 0.4, "computed"),
    Span("compute", 1, 0.4, 0.5, "preempted"),
    Span("load-0", 3, 0.0, 0.3, "loaded"),
    Span("load-1", 2, 0.0, 0.5, "corrupt"),
    Span("load-1", 1, 0.5, 0.6, "shared"),
    Span("compute", -1, 0.6, 0.8, "gated"),
    Span("load-0", 0, 0.3, 0.7, "superseded"),
]
REPORT = Report(tokens=2100, chunks_loaded=1, chunks_computed=2, timeline=TIMELINE)
COSTS = Costs(ComputeCost(1.0), LoadCost(0.0, 10.0, 10.0))


def shown(figure: Any) -> list[str]:
    """All labels of the legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_lane_for_each_thread_and_a_bar_for_each_span() -> None:
    figure = cake_hf.plot_timeline(REPORT)
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["loader 1", "loader 0", "main thread"]
    drawn = sorted((round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in panel.patches)
    assert drawn == sorted((span.start, round(span.end - span.start, 6)) for span in TIMELINE)
    assert shown(figure) == ["computed", "loaded", "shared", "preempted", "superseded", "not usable"]
    assert figure.get_suptitle() == "2,100 tokens: 1 chunks loaded, 2 computed"


def test_unusable_chunks_are_plotted_in_red() -> None:
    colours = {plots._shade_of(span) for span in TIMELINE if span.outcome in ("computed", "gated")}
    assert colours == {"computed"}
    assert plots._shade_of(TIMELINE[3]) == "not usable"


def test_a_notebook_shows_it_without_pyplot() -> None:
    for figure in (plots.plot_timeline(REPORT), plots.plot_ttft({"warm": 0.1}), plots.plot_split(COSTS, 4)):
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert figure.canvas.manager is None


def test_bars_stand_in_the_given_order() -> None:
    (panel,) = plots.plot_ttft({"cold": 2.0, "warm": 0.125}, "first token").axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["cold", "warm"]
    assert [bar.get_width() for bar in panel.patches] == [2.0, 0.125]
    assert panel.yaxis.get_inverted()
    assert [text.get_text() for text in panel.texts] == ["2.00 s", "125 ms"]


def test_the_curve_is_the_longer_of_two_sides() -> None:
    figure = plots.plot_split(COSTS, 6, {"measured": REPORT})
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()}
    front, back = lines["computing the front"][1], lines["loading the back"][1]
    assert (front, back) == ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0])
    assert lines["both at once"][1] == [max(pair) for pair in zip(front, back, strict=True)]
    assert lines["measured"] == ([2], [0.6])  # not the last piece, nor what came too late
    assert [text.get_text() for text in figure.axes[0].texts] == ["best: compute 3, load 3"]


@pytest.mark.parametrize(
    ("draw", "complaint"),
    [
        (lambda: plots.plot_timeline(Report()), "no prompt was restored with this cache yet"),
        (lambda: plots.plot_timeline(Report(reason="it is too short")), "it is too short"),
        (lambda: plots.plot_ttft({}), "no times to be drawn"),
        (lambda: plots.plot_split(Costs(), 4), "needs the costs of computing and of loading"),
        (lambda: plots.plot_split(COSTS, 0), "at least one chunk"),
    ],
)
def test_a_report_that_cannot_be_plotted_is_refused(draw: Any, complaint: str) -> None:
    with pytest.raises((CakeError, ValueError), match=complaint):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CakeError, match=r"pip install 'cake-hf\[plots\]'"):
        plots.plot_ttft({"warm": 0.1})
