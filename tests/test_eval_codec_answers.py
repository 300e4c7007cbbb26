"""`python -m eval.codec_answers`: answers with coded KV beside those with exact KV, resumed where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cake_hf.assets import RECALL_TINY
from eval import codec_answers
from eval.codec_answers import EAGER, EXACT, main, summary


def line(codec: str, row: str, tokens: list[int], score: float, task: str = "hotpotqa") -> dict[str, Any]:
    return {"task": task, "row": row, "codec": codec, "tokens": tokens, "score": score}


def test_only_rows_that_all_codecs_have_answered_count() -> None:
    lines = [
        line(EXACT, "0", [1], 1.0),
        line("int4", "0", [1], 1.0),
        line(EXACT, "1", [2], 0.0),
        line("int4", "1", [3], 0.5),
    ]
    found = summary([*lines, line(EXACT, "2", [4], 1.0)])
    assert (found[EXACT]["rows"], found[EXACT]["equal"], found[EXACT]["score"]) == (2, 2, 0.5)
    assert (found["int4"]["rows"], found["int4"]["equal"], found["int4"]["score"]) == (2, 1, 0.75)


def test_the_score_is_the_mean_over_tasks_and_not_over_rows() -> None:
    lines = [line(EXACT, "0", [1], 1.0), line(EXACT, "1", [1], 1.0), line(EXACT, "0", [1], 0.0, task="trec")]
    assert summary(lines)[EXACT]["score"] == 0.5


def asked(folder: Path) -> list[str]:
    """Writes two rows, and returns the options for a run."""
    record = {"input": "Who?", "context": "The story. " * 200, "answers": ["me"], "all_classes": None}
    rows = [json.dumps({**record, "dataset": "hotpotqa", "_id": str(number)}) for number in range(2)]
    (folder / "hotpotqa.jsonl").write_text("\n".join(rows))
    options = ["--model", str(RECALL_TINY), "--data", str(folder), "--tasks", "hotpotqa", "--codecs", "near,int4"]
    return [*options, "--out", str(folder / "results" / "answers.jsonl"), "--answer", "3", "--tokens", "400"]


def test_rows_are_answered_by_all_codecs_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, out = asked(tmp_path), tmp_path / "results" / "answers.jsonl"
    main([*options, "--rows", "1"])
    first = out.read_text().splitlines()
    assert [json.loads(one)["codec"] for one in first] == [EXACT, EAGER, "near", "int4"]
    assert [json.loads(one)["lossy"] > 0 for one in first] == [False, False, True, True]
    main([*options, "--rows", "2"])
    assert out.read_text().splitlines()[:4] == first
    assert json.loads(out.with_suffix(".json").read_text())["codecs"]["near"]["rows"] == 2
    assert "of 2 answers equal" in capsys.readouterr().out


def test_an_answer_that_differs_when_it_is_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, answered = codec_answers._ask, []

    def differ(*given: Any) -> Any:
        tokens, report = ask(*given)
        answered.append(tokens)
        return [*tokens, len(answered)], report

    monkeypatch.setattr(codec_answers, "_ask", differ)
    with pytest.raises(RuntimeError, match="another one"):
        main([*asked(tmp_path), "--rows", "1"])
