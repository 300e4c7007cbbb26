"""What counts as exact, and what the report says about it: over outcomes that are written down here."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from demo.asking import Answer
from eval.compare import Metrics, compare
from eval.config import make_config
from eval.outcomes import Outcome, digests, first_difference, margins
from eval.page import bars, make_page
from eval.tables import cells, lists, percent, verdict


def outcome(mode: str, row: str = "r0", **changed: Any) -> Outcome:
    plain = Outcome("qasper", row, mode, [5, 6, 7], ["a", "b", "c"], [0.5, 0.25, 0.125], "text", 1.0, 1000)
    return replace(plain, **changed)


def both_oracles(row: str = "r0") -> list[Outcome]:
    return [outcome("plain", row), outcome("chunked", row)]


def test_all_equal_is_exact() -> None:
    metrics = compare([*both_oracles(), outcome("warm", loaded=2)], {}, float32=True)
    assert metrics.exact
    assert (metrics.rows, metrics.broken, metrics.differences, metrics.loaded_anything) == (1, [], [], True)
    warm = metrics.tasks["qasper"].modes["warm"]
    assert (warm.tokens_as_single, warm.tokens_as_chunked, warm.logits_as_chunked, warm.loaded) == (1, 1, 1, 1)


@pytest.mark.parametrize("mode", ["cold", "warm", "middle", "faults"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": [5, 9, 7]}, "another token than the chunked run's at new token 1"),
        ({"tokens": [5, 6], "digests": ["a", "b"]}, "another token than the chunked run's at new token 2"),
        ({"digests": ["a", "b", "x"]}, "other logits than the chunked run's at new token 2"),
        ({"error": "StoreError: it broke"}, "StoreError: it broke"),
    ],
)
@pytest.mark.parametrize("float32", [True, False])
def test_a_cached_run_that_differs_from_the_chunked_one_breaks_exactness(
    mode: str, changed: dict[str, Any], words: str, float32: bool
) -> None:
    metrics = compare([*both_oracles(), outcome(mode, **changed)], {}, float32=float32)
    assert metrics.broken == [f"qasper/r0 {mode}: {words}"]
    assert "BROKEN" in verdict(metrics)


def test_logits_of_the_single_shot_run_may_be_others() -> None:
    single = outcome("plain", digests=["x", "y", "z"])
    assert compare([single, outcome("chunked"), outcome("warm")], {}, float32=True).exact


def test_tokens_of_the_single_shot_run_are_law_in_float32_and_listed_below_it() -> None:
    single = outcome("plain", tokens=[5, 9, 7], margins=[0.5, 0.001, 0.125])
    outcomes = [single, outcome("chunked"), outcome("warm")]
    low = compare(outcomes, {}, float32=False)
    assert low.exact
    assert [(d.mode, d.position, d.margin) for d in low.differences] == [("chunked", 1, 0.001), ("warm", 1, 0.001)]
    assert low.tasks["qasper"].modes["warm"].tokens_as_single == 0
    assert "from new token 1 on; the best logit led by 0.001" in lists(low)["Other tokens than the single-shot run"][0]
    assert len(compare(outcomes, {}, float32=True).broken) == 2


def test_metrics_of_a_mode() -> None:
    outcomes = [
        *both_oracles("r0"),
        *both_oracles("r1"),
        *both_oracles("r2"),
        outcome("warm", "r0", ttft=1.0, loaded=3, computed=1),
        outcome(
            "warm", "r1", ttft=4.0, loaded=0, computed=4, missed=1, failed=2, digests=["a", "b", "x"], note="too short"
        ),
        outcome("warm", "r2", error="boom"),
    ]
    metrics = compare(outcomes, {("qasper", "r0", "warm"): 1.0, ("qasper", "r1", "warm"): 0.5}, float32=False)
    warm = metrics.tasks["qasper"].modes["warm"]
    assert (warm.rows, warm.errors, warm.score, warm.ttft, warm.failed) == (2, 1, 0.75, 2.5, 2)
    assert (warm.hit_rate, warm.loaded) == (7 / 8, 3 / 8)
    assert (warm.tokens_as_chunked, warm.logits_as_chunked) == (1.0, 0.5)
    assert metrics.tasks["qasper"].modes["plain"].hit_rate is None
    assert metrics.notes == {"qasper/r1 warm": "too short"}
    assert cells(warm) == ["2 of 3", "100 %", "100 %", "50 %", "75.00", "2.500", "87 %", "37 %"]


def test_nearly_all_is_not_shown_as_all() -> None:
    assert [percent(share) for share in (0, 1 / 3, 0.9999, 1)] == ["0 %", "33 %", "99 %", "100 %"]


def test_a_run_that_loaded_nothing_says_so() -> None:
    assert "nothing was loaded" in verdict(compare([*both_oracles(), outcome("warm", computed=2)], {}, float32=True))
    assert verdict(Metrics()) == "Nothing could be run."


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1], [1, 3]) == 1
    assert first_difference([], [1]) == 0


def test_digests_see_every_bit() -> None:
    logits = torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, -1.0]])
    answer = Answer(torch.tensor([2, 1]), logits, 0.0)
    same, negative_zero, nudged = logits.clone(), logits.clone(), logits.clone()
    negative_zero[0, 0] = -0.0
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(0.0))
    others = [digests(replace(answer, logits=changed)) for changed in (same, negative_zero, nudged)]
    assert [[one == other for one, other in zip(digests(answer), changed, strict=True)] for changed in others] == [
        [True, True],
        [False, True],
        [True, False],
    ]
    assert margins(answer) == [3.0, 1.0]
    assert margins(replace(answer, logits=logits.bfloat16())) == [3.0, 1.0]


def test_outcomes_are_kept_as_json() -> None:
    assert Outcome.from_dict(outcome("warm").as_dict()) == outcome("warm")
    with pytest.raises(TypeError):
        Outcome.from_dict({"task": "qasper"})


class Reader(HTMLParser):
    """Checks that all tags are closed in order, and gathers what a browser would have to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href", "data")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_says_it_all() -> None:
    warm = outcome("warm", loaded=2, digests=["x"] * 3, note="<b>odd</b>")
    metrics = compare([*both_oracles(), warm], {("qasper", "r0", "warm"): 0.25}, float32=False)
    metrics.skipped["qasper/r9"] = "it has no 'answers'"
    config = make_config({"model": "me/<model>", "tasks": "qasper", "store": "s"})
    page, reader = make_page(config, metrics, {"versions": {"torch": "2"}}), Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.fetched == []
    assert not re.search(r"@import|url\(|<script|<b>odd|<model>", page)
    for words in (
        "me/<model>",
        "BROKEN",
        "other logits",
        "<b>odd</b>",
        "it has no 'answers'",
        config.digest,
        '"torch"',
    ):
        assert words in reader.text
    assert page.count("<svg") == 3  # first tokens, hits, scores
    assert "class='bad'>0 %" in page


def test_bars_are_as_long_as_their_values() -> None:
    picture = bars({"a": {"plain": 2.0, "warm": 1.0}, "b": {"warm": 0.0}}, str)
    lengths = [float(found) for found in re.findall(r"width='([\d.]+)' height='10'", picture)]
    assert lengths[0] == pytest.approx(2 * lengths[1])
    assert lengths[2] == 0.5
    assert "<svg" in bars({}, str)
