"""`python -m eval.methods`: a row per method, resumed where it was, and a table made of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cake_hf.assets import RECALL_TINY
from cake_hf.cli.models import load_tokenizer
from eval.data.prompts import load_templates
from eval.data.rows import Row
from eval.methods import tables
from eval.methods.__main__ import main
from eval.methods.contestants import FULL, contestants
from eval.methods.runs import split_row
from eval.tasks import find_task


def line(method: str, row: str, score: float, **changed: Any) -> dict[str, Any]:
    seconds = dict.fromkeys(tables.SECONDS, 1.0)
    setting = {"model": "m", "dtype": "float32", "threads": 1, "machine": {"cores": 2, "cpu": "a processor"}}
    plain = {"task": "hotpotqa", "row": row, "method": method, "tokens": 100, "bytes": 2048, "share": 1.0, "error": 0.0}
    return {**plain, "score": score, **seconds, **setting, **changed}


def test_rows_are_run_by_all_methods_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {
            "_id": str(number),
            "input": "Who?",
            "context": f"The {number}th story. " * 40,
            "answers": ["me"],
            "all_classes": None,
        }
        for number in range(2)
    ]
    (tmp_path / "hotpotqa.jsonl").write_text("\n".join(json.dumps({**one, "dataset": "hotpotqa"}) for one in records))
    out = tmp_path / "results" / "rows.jsonl"
    options = ["--model", str(RECALL_TINY), "--data", str(tmp_path), "--tasks", "hotpotqa", "--out", str(out)]
    options += ["--dtype", "float32", "--answer", "3", "--tokens", "100", "--measured", "1"]
    assert main([*options, "--rows", "1"]) == 0
    first = out.read_text().splitlines()
    assert [json.loads(line)["method"] for line in first] == list(contestants(None))
    assert main([*options, "--rows", "2"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 * len(first)
    assert out.read_text().splitlines()[: len(first)] == first
    assert all((line["error"] is not None) == (line["row"] == "0") for line in lines if line["method"] != FULL)
    assert {
        name: found["rows"] for name, found in json.loads(out.with_suffix(".json").read_text())["methods"].items()
    } == (dict.fromkeys(contestants(None), 2))
    assert "| full KV | 2 |" in capsys.readouterr().out


def test_a_document_is_split_from_its_question() -> None:
    tokenizer, task = load_tokenizer(str(RECALL_TINY)), find_task("hotpotqa")
    row = Row("hotpotqa", "0", "One two three four. " * 50, "Who was it?", ("me",))
    template = load_templates()["hotpotqa"]
    document, question = split_row(tokenizer, task, template, row, 64)
    assert "Who was it?" in tokenizer.decode(question)
    assert "four" not in tokenizer.decode(question)
    assert len(document) < 64 + len(tokenizer(template.first).input_ids)


def test_the_table_compares_each_method_with_the_full_kv_on_its_own_rows() -> None:
    result = tables.summary(
        [line(FULL, "0", 1.0), line(FULL, "1", 0.5), line("ThinK", "1", 0.25, share=0.5, error=None)]
    )
    think = result["methods"]["ThinK"]
    assert (think["rows"], think["score"], think["full_score"], think["share"]) == (1, 0.25, 0.5, 0.5)
    text = tables.page(result)
    assert "| ThinK | 1 | 25.0 | 50.0 | 25.0 | 50 % | - |" in text


def test_a_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for text in ("one", "two"):
        tables.fill(page, text)
        assert page.read_text() == f"before\n{tables.BEGIN}\n\n{text}\n\n{tables.END}\nafter\n"
