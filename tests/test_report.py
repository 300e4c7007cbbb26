"""A report prints itself whatever happened, and its lanes fit their frame."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import Report
from cake_hf.report import LANE_WIDTH, Refusal, Span

fewer = settings(max_examples=50)

OUTCOMES = ["computed", "loaded", "missed", "corrupt", "error", "late", "preempted", "gated", "shared", "superseded"]
seconds = st.floats(0, 1e6)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start, end = sorted([draw(seconds), draw(seconds)])
    actor = draw(st.sampled_from(["compute", "load-0", "load-1"]))
    return Span(actor, draw(st.integers(-1, 9999)), start, end, draw(st.sampled_from(OUTCOMES)))


@st.composite
def reports(draw: st.DrawFn) -> Report:
    count = st.integers(0, 2**40)
    names = [name for name, kind in Report.__annotations__.items() if kind == "int"]
    counts = {name: draw(count) for name in names}
    return Report(**counts, prefill_seconds=draw(seconds), timeline=draw(st.lists(spans())), reason=draw(st.text()))


@fewer
@given(reports())
def test_any_report_prints_as_text(report: Report) -> None:
    text = str(report)
    assert text.startswith("cake_hf report\n")
    assert all(value in text for _, value in report.rows())


@fewer
@given(reports())
def test_lanes_are_one_per_actor_and_of_one_width(report: Report) -> None:
    drawn = re.findall(r"^(compute|load-\d)\s*\|(.*)\|$", str(report), flags=re.MULTILINE)
    happened = any(span.end > 0 for span in report.timeline)
    assert [actor for actor, _ in drawn] == (list(report.lanes()) if happened else [])
    assert all(len(lane) == LANE_WIDTH for _, lane in drawn)


@fewer
@given(reports())
def test_lanes_lose_no_span(report: Report) -> None:
    lanes = report.lanes()
    assert list(lanes) == sorted(lanes)
    assert all(span.actor == actor for actor, spans in lanes.items() for span in spans)
    assert sum(len(spans) for spans in lanes.values()) == len(report.timeline)


@fewer
@given(reports())
def test_any_report_is_json(report: Report) -> None:
    read = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert read["chunks_loaded"] == report.chunks_loaded
    assert read["reason"] == report.reason
    assert [(actor, chunk, outcome) for actor, chunk, _, _, outcome in read["timeline"]] == [
        (span.actor, span.chunk, span.outcome) for span in report.timeline
    ]


@fewer
@given(reports())
def test_printing_changes_nothing(report: Report) -> None:
    before = repr(report), list(report.timeline)
    str(report), report._repr_html_(), report.as_dict(), report.lanes()
    assert (repr(report), report.timeline) == before


def test_a_refusal_sets_the_reason_and_its_code_and_none_clears_both() -> None:
    report = Report()
    assert (report.reason, report.reason_code) == ("", "")
    report.explain(Refusal("store-not-asked", "the store could not be asked: redis://me:secret@host is down"))
    assert report.reason == "the store could not be asked: redis://host is down"
    assert report.as_dict()["reason_code"] == report.reason_code == "store-not-asked"
    report.explain(None)
    assert (report.reason, report.reason_code) == ("", "")


def test_a_reason_cannot_break_out_of_the_page() -> None:
    page = Report(reason="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_page_has_the_table_and_the_timeline() -> None:
    timeline = [Span("compute", 0, 0.0, 1.0, "computed"), Span("load-0", 1, 0.0, 2.0, "late")]
    report = Report(timeline=timeline)
    assert "\n".join(report.text_lanes()) in report._repr_html_()
    assert "<pre>" not in Report()._repr_html_()


def test_an_actor_cannot_break_out_of_the_page() -> None:
    page = Report(timeline=[Span("<b>", 0, 0.0, 1.0, "computed")])._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize("width", [10, 60, 200])
def test_the_timeline_is_as_wide_as_it_is_wanted(width: int) -> None:
    timeline = [Span("compute", 0, 0.0, 1.0, "computed"), Span("load-0", 11, 0.5, 2.0, "loaded")]
    assert {len(line) for line in Report(timeline=timeline).text_lanes(width)} == {len("compute ||") + width}


def test_what_was_not_usable_looks_different() -> None:
    good = Report(timeline=[Span("load-0", 3, 0.0, 1.0, "loaded")])
    bad = Report(timeline=[Span("load-0", 3, 0.0, 1.0, "corrupt")])
    assert "3===" in str(good)
    assert "3!!!" in str(bad)


def test_rows_of_what_did_not_happen_are_left_out() -> None:
    assert {"not saved", "note"}.isdisjoint(label for label, _ in Report().rows())
    assert ("not saved", "2 chunks") in Report(chunks_unsaved=2).rows()
    assert ("note", "why") in Report(reason="why").rows()


def test_bytes_are_written_for_people() -> None:
    values = [dict(Report(bytes_loaded=count).rows())["loaded"] for count in (0, 1023, 1536, 5 * 2**20, 3 * 2**30)]
    assert values == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.00 GiB"]
