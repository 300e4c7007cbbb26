"""`python -m eval.methods`: a row per method, resumed where it was, and a table made of the rows."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf.assets import RECALL_TINY
from cake_hf.cli.models import load_tokenizer
from cake_hf.presses import KVSharer
from eval.data.prompts import load_templates
from eval.data.rows import Row
from eval.data.shorten import shortened
from eval.methods import tables, vision
from eval.methods.__main__ import main, rows_in_turn
from eval.methods.contestants import FULL, chosen, contestants
from eval.methods.runs import Times, split_row
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
            "context": f"The {number}th story. " * 90,
            "answers": ["me"],
            "all_classes": None,
        }
        for number in range(2)
    ]
    (tmp_path / "hotpotqa.jsonl").write_text("\n".join(json.dumps({**one, "dataset": "hotpotqa"}) for one in records))
    out = tmp_path / "results" / "rows.jsonl"
    options = ["--model", str(RECALL_TINY), "--data", str(tmp_path), "--tasks", "hotpotqa", "--out", str(out)]
    options += ["--dtype", "float32", "--answer", "3", "--tokens", "300", "--measured", "1"]
    assert main([*options, "--rows", "1"]) == 0
    first = out.read_text().splitlines()
    assert [json.loads(line)["method"] for line in first] == list(contestants())
    assert main([*options, "--rows", "2"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 * len(first)
    assert out.read_text().splitlines()[: len(first)] == first
    assert all((line["error"] is not None) == (line["row"] == "0") for line in lines if line["method"] != FULL)
    assert {
        name: found["rows"] for name, found in json.loads(out.with_suffix(".json").read_text())["methods"].items()
    } == (dict.fromkeys(contestants(), 2))
    assert "| full KV | 2 |" in capsys.readouterr().out


def test_a_document_is_split_from_its_question() -> None:
    tokenizer, task = load_tokenizer(str(RECALL_TINY)), find_task("hotpotqa")
    row = Row("hotpotqa", "0", "One two three four. " * 50, "Who was it?", ("me",))
    template = load_templates()["hotpotqa"]
    document, question = split_row(tokenizer, task, template, row, 64)
    assert "Who was it?" in tokenizer.decode(question)
    assert "four" not in tokenizer.decode(question)
    assert len(document) < 64 + len(tokenizer(template.first).input_ids)


def test_a_long_document_keeps_what_stands_around_the_answer() -> None:
    tokenizer, filler = load_tokenizer(str(RECALL_TINY)), "One two three four. " * 50
    row = Row("hotpotqa", "0", f"The first. {filler}It was Zoe. {filler}The last.", "Who was it?", ("Zoe",))
    for task, answers, kept in (
        ("hotpotqa", ("Zoe",), "Zoe"),
        ("hotpotqa", ("Ann",), "first"),
        ("trec", ("Zoe",), "last"),
    ):
        text = shortened(tokenizer, find_task(task), replace(row, answers=answers), 60)
        assert kept in text
        assert (kept == "Zoe") == ("Zoe" in text)
        assert len(tokenizer(text).input_ids) <= 62
    short = replace(row, document="It was Zoe.")
    assert shortened(tokenizer, find_task("hotpotqa"), short, 60) == "It was Zoe."


def test_examples_become_questions_where_a_few_shot_task_has_too_few_rows(tmp_path: Path) -> None:
    examples = "".join(f"Question: What is {number}?\nType: kind {number}\n" for number in range(9))
    record = {
        "_id": "a",
        "input": "Question: And you?\nType:",
        "context": examples,
        "answers": ["me"],
        "all_classes": ["me"],
    }
    (tmp_path / "trec.jsonl").write_text(json.dumps(record))
    asked = Namespace(tasks="trec", data=str(tmp_path), rows=3, tokens=1024)
    own, *others = [row for _, row in rows_in_turn(asked)]
    assert (own.document, own.answers) == (examples, ("me",))
    assert [(row.question, row.answers) for row in others] == [
        (f"Question: What is {number}?\nType:", (f"kind {number}",)) for number in (6, 7)
    ]
    assert all("What is 5?" in row.document and "What is 6?" not in row.document and not row.history for row in others)


@pytest.mark.parametrize(("said", "stops"), [("\n\nkind", False), ("\nkind 1\n", True), ("kind", False)])
def test_an_answer_of_one_line_ends_with_the_line(said: str, stops: bool) -> None:
    ids = torch.tensor([[1, 2, 3]])
    for decode, stopped in ((lambda new: said if new.tolist() == [2, 3] else "", stops), (None, False)):
        times = Times(decode, 1)
        assert times(ids, None).tolist() == [stopped]
        assert len(times.tokens) == 1


def test_methods_that_are_prepared_for_a_model_come_with_their_files(tmp_path: Path) -> None:
    pairs = tmp_path / "shared.json"
    pairs.write_text(json.dumps({"0.1": [[2, 0]], "0.25": [[2, 0], [3, 1]]}))
    found = contestants(shared=pairs)
    assert set(found) - set(contestants()) == {"KVSharer, 1 layers share", "KVSharer, 2 layers share"}
    assert found["KVSharer, 2 layers share"] == KVSharer(((2, 0), (3, 1)))
    assert list(chosen(found, ["KVSharer, 2 layers share", FULL])) == [FULL, "KVSharer, 2 layers share"]
    with pytest.raises(ValueError, match="no method 'mine'"):
        chosen(found, ["mine"])


def test_layers_that_share_are_found_on_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gov_report", "qasper"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"context": "The first story, and another one. " * 20}))
    pairs = tmp_path / "shared.json"
    options = ["--model", str(RECALL_TINY), "--data", str(tmp_path), "--out", str(pairs), "--tokens", "32"]
    monkeypatch.setattr(sys, "argv", ["share_layers.py", *options, "--share", "0.5", "--threshold", "-1"])
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "training"))
    import share_layers

    share_layers.main()
    [(share, found)] = json.loads(pairs.read_text()).items()
    assert share == "0.5"
    assert found
    assert all(source < layer for layer, source in found)


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
    begin, end = "<!-- eval.methods writes from here -->", "<!-- to here -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for text in ("one", "two"):
        tables.fill(page, text)
        assert page.read_text() == f"before\n{begin}\n\n{text}\n\n{end}\nafter\n"
    with pytest.raises(ValueError, match=r"no place for eval\.methods\.vision"):
        tables.fill(page, "three", "eval.methods.vision")


def test_the_presses_for_images_hold_their_budgets_on_a_restored_prompt() -> None:
    result = vision.measure()
    assert result["images"] == 2 * 144
    for row in result["rows"]:
        assert row["share"] == pytest.approx(row["keep"], abs=0.02)
        even = len({round(entries) for entries in row["entries"]}) == 1
        assert even == (row["method"] != "VLCache")
    for method in ("VLCache", "ElasticCache", "eviction alone"):
        errors = [row["error"] for row in result["rows"] if row["method"] == method]
        assert errors == sorted(errors)
    assert "| VLCache | 50 % | 50 % |" in vision.page(result)
