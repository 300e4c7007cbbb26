"""A trace answered by a model: the same sharing in short prompts, the same tokens in all ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.traces import live as live_module
from benchmarks.traces.generating import generate
from benchmarks.traces.live import FIRST, Live
from benchmarks.traces.methods import BOTH, COMPUTE, LOAD, threshold
from benchmarks.traces.prompts import Scale, prompts_of, vocabulary_of
from benchmarks.traces.stored import hits_of
from commands import run_benchmark
from made_traces import trace_of
from models import build


def live_of(model: Any, **changes: Any) -> Live:
    given: dict[str, Any] = {"scale": Scale(16, most=6), "thresholds": (32,), "new_tokens": 3}
    return Live(model, throttle=lambda store, rate: store, **given | changes)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama")


def test_a_trace_is_made_smaller_with_the_same_sharing() -> None:
    trace = trace_of([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0]], tokens=256)
    same, half, short = (Scale(16, *how).smaller(trace) for how in ((1, 64), (2, 64), (1, 2)))
    assert (same.block, [one.tokens for one in same.requests]) == (16, [72, 72, 72, 24])
    assert hits_of(same) == hits_of(trace) == [0, 3, 1, 1]
    assert [len(one.blocks) for one in half.requests] == [2, 2, 2, 0]
    assert hits_of(half) == [0, 1, 0, 0]
    assert [len(one.blocks) for one in short.requests] == [2, 2, 2, 1]
    assert all(0 < one.tokens - 16 * len(one.blocks) <= 16 for one in (*half.requests, *short.requests))


def test_blocks_become_the_same_tokens_each_time(tiny: Any) -> None:
    trace = Scale(16).smaller(trace_of([[0, 0], [0, 1], [0, 0]], tokens=256))
    vocabulary = vocabulary_of(tiny)
    first, second, third = prompts_of(trace, vocabulary)
    assert [one.hits for one in (first, second, third)] == [0, 16, 32]
    assert torch.equal(first.ids[:, :16], second.ids[:, :16])
    assert not torch.equal(first.ids[:, 16:32], second.ids[:, 16:32])
    assert torch.equal(first.ids[:, :32], third.ids[:, :32])
    assert not torch.equal(first.ids[:, 32:], third.ids[:, 32:])
    assert {first.ids.shape, third.ids.shape} == {(1, 40)}
    assert tiny.config.eos_token_id not in vocabulary


def test_all_ways_give_the_same_tokens(tiny: Any) -> None:
    result = live_of(tiny).run(generate("documents", FIRST + 3, 2))
    assert result.details["other_tokens"] == []
    assert "the same tokens in all ways" in result.title
    ways = result.details["methods"]
    assert list(ways) == [COMPUTE, LOAD, threshold(32), BOTH]  # type: ignore[call-overload]
    assert result.figures.keys() == {LOAD, threshold(32), BOTH}
    assert ways[LOAD]["loaded"] > 0 == ways[COMPUTE]["loaded"]  # type: ignore[index]
    smaller = Scale(16, most=6).smaller(generate("documents", FIRST + 3, 2))
    assert ways[LOAD]["loaded"] == sum(hits_of(smaller)[FIRST:])  # type: ignore[index]


def test_other_tokens_are_noticed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers_wrongly(*arguments: Any, **options: Any) -> Any:
        answer = live_module.ask_plainly(*arguments, **options)
        return replace(answer, tokens=answer.tokens + 1)

    monkeypatch.setattr(live_module, "ask", lambda model, ids, cache, new: answers_wrongly(model, ids, new, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Live, "_rate", lambda live, prompts: 1e9)
        result = live_of(tiny).run(generate("chat", FIRST + 1))
    assert result.details["other_tokens"] == [LOAD, threshold(32), BOTH]
    assert "OTHER TOKENS: load, load from 32, both" in result.title


def test_too_few_requests_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=rf"first {FIRST} requests are not counted; {FIRST} are too few"):
        live_of(tiny).run(generate("chat", FIRST))


def test_the_command_answers_with_the_packages_model(tmp_path: Path) -> None:
    out, page = tmp_path / "live.json", tmp_path / "page.md"
    options = ["--kind", "agents", "--requests", FIRST + 1, "--chunk-size", 16, "--most", 4, "--loading", 0.5]
    run = run_benchmark("traces", "live", *options, "--threshold", 32, "--new-tokens", 2, "--out", out)
    assert run.exit_code == 0, run.output
    assert "TTFT over computing only, both" in run.output
    page.write_text("<!-- traces live -->\n<!-- end of traces live -->\n")
    assert run_benchmark("traces", "page", out, "--page", page).exit_code == 0
    assert "| agents | 0.5 |" in page.read_text()
    assert "The tokens are the same in all ways." in page.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--most", 10_000], "choose a smaller --most"), (["--loading", 0], "above 0"), (["--requests", 2], "too few")],
)
def test_live_options_that_cannot_be_are_refused(options: list[object], words: str) -> None:
    run = run_benchmark("traces", "live", "--kind", "chat", *options)
    assert run.exit_code == 2
    assert words in run.output
