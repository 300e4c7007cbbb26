"""The walk of a new user: it runs, it finds what is not equal, and pages and chart show what was measured."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.figures import Goal
from cake_hf.cli.models import RECALL_TINY, load_tokenizer
from eval.data.sources import MissingData
from eval.walk import __main__ as command
from eval.walk import chart, course, findings, fresh, real_model, tables, ways
from eval.walk.course import Walked, turned
from eval.walk.documents import QUESTIONS, find_documents, make_document
from eval.walk.taken import COMPUTE, COPY, LOAD, Clock, Taken
from eval.walk.ways import OURS, RECIPE, SINGLE, WAYS

ROOT = Path(__file__).parent.parent
QUICK = ["--quick", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(RECALL_TINY))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the whole command, new processes included."""
    out = tmp_path_factory.mktemp("walk") / "walk.json"
    threads = torch.get_num_threads()
    assert command.main([*QUICK, "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What should happen in a new process happens in this one, which is quicker."""
    monkeypatch.setattr(course, "ask_in_new_process", fresh.answer)


# The command.


def test_every_way_is_measured(result: dict[str, Any]) -> None:
    (document,) = result["documents"]
    assert [one["way"] for one in document["taken"] if one["question"] == 0] != []
    assert {one["way"] for one in document["taken"]} == set(WAYS)
    assert {one["question"] for one in document["taken"] if one["way"] in (RECIPE, ways.COPIED)} == {0, 1}
    for one in document["taken"]:
        assert len(one["tokens"]) == result["tokens"]
        assert one["note"] == "" or one["way"] == ways.COLD
        assert 0 < sum(one["asked"].values()) <= one["answered"] + 0.001
    assert all(size > 0 for size in document["on_disk"].values())


def test_ours_are_restored_and_equal(result: dict[str, Any]) -> None:
    (document,) = result["documents"]
    expected = {one["question"]: one["digests"] for one in document["expected"]}
    for one in document["taken"]:
        if one["way"] in OURS:
            assert one["digests"] == expected[one["question"]]
            assert one["loaded"] + one["computed"] > 1
            assert (one["loaded"] == 0) == (one["way"] == ways.COLD)
    assert result["broken"] == []


def test_the_document_is_chunks_and_a_tail(result: dict[str, Any]) -> None:
    (document,) = result["documents"]
    cold = next(one for one in document["taken"] if one["way"] == ways.COLD)
    assert cold["computed"] == -(-document["tokens"] // result["chunk_size"])


def test_each_way_spends_only_its_own_kinds_of_time(result: dict[str, Any]) -> None:
    (document,) = result["documents"]
    kinds = {one["way"]: (set(one["prepared"]), set(one["asked"])) for one in document["taken"] if not one["question"]}
    assert kinds[SINGLE] == (set(), {COMPUTE})
    assert kinds[ways.COLD] == ({COMPUTE}, {COMPUTE})
    assert kinds[RECIPE] == ({COMPUTE}, {COPY, COMPUTE})
    assert kinds[ways.COPIED] == ({LOAD}, {COPY, COMPUTE})
    assert kinds[ways.NEW] == kinds[ways.TORCH_LOAD] == ({LOAD}, {COMPUTE})


@pytest.mark.usefixtures("here")
def test_a_missed_goal_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    impossible = {name: (*goal[:4], Goal(0.0)) for name, goal in findings.GOALS.items()}
    monkeypatch.setattr(findings, "GOALS", impossible)
    assert command.main(QUICK) == 0
    assert "All that must be equal is equal." in capsys.readouterr().out


@torch.inference_mode()
def edit_a_value(prepared: Any) -> Any:
    prepared.cache.layers[0].values[..., 0, 0] += 1
    return prepared


@torch.inference_mode()
def lose_a_key(prepared: Any) -> Any:
    prepared.cache.layers[-1].keys[..., -1, :] = 0
    return prepared


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("spoil", [edit_a_value, lose_a_key])
def test_different_bits_in_our_answers_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: Any
) -> None:
    """What is expected is spoilt, since a cache of ours notices when its content is."""
    pieces = ways.Ways.pieces
    monkeypatch.setattr(ways.Ways, "pieces", lambda self: spoil(pieces(self)))
    assert command.main(QUICK) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--documents", "0"], "no number from 1 on"),
        (["--documents", "100,x"], "no number from 1 on"),
        (["--repeats", "-1"], "no number from 1 on"),
        (["--threads", "0"], "no number from 1 on"),
    ],
)
def test_unusable_options_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in capsys.readouterr().err


def test_a_walk_that_cannot_run_ends_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real_model, "PACKAGE", "no_such_package")
    wrong = {
        "pip install": [],
        "There is no folder": ["--model", str(tmp_path / "none")],
        "there is room for": [*QUICK, "--documents", "40000"],
        "measure first": ["--chart", "--out", str(tmp_path / "none.json")],
    }
    for words, arguments in wrong.items():
        assert command.main(arguments) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said


# What must be equal.


def taken(way: str, question: int, tokens: Sequence[int] = (1, 2), digests: Sequence[str] = ("a", "b")) -> Taken:
    return Taken(way, 9, 0, question, {}, {COMPUTE: 1.0}, 2.0, 0.0, 3.0, 0, 0, list(tokens), list(digests), "text")


def walked(tokenizer: Any, *others: Taken) -> Walked:
    """All equal, and then these."""
    both = [
        taken(way, question) for way in WAYS for question in (0, 1) if question == 0 or way in (RECIPE, ways.COPIED)
    ]
    document = make_document(tokenizer, "a text", "Once upon a time.", QUESTIONS)
    return Walked(document, [*both, *others], [taken(ways.PIECES, 0), taken(ways.PIECES, 1)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_is_not_broken(tokenizer: Any, dtype: str) -> None:
    assert findings.broken(walked(tokenizer), dtype) == []


@pytest.mark.parametrize("way", OURS)
def test_bits_of_ours_must_be_equal(tokenizer: Any, way: str) -> None:
    for dtype in ("float32", "bfloat16"):
        (line,) = findings.broken(walked(tokenizer, taken(way, 1, digests=("a", "c"))), dtype)
        assert way in line
        assert "other bits" in line


@pytest.mark.parametrize("way", [way for way in WAYS if way not in (*OURS, SINGLE)])
def test_different_bits_in_other_ways_are_only_shown(tokenizer: Any, way: str) -> None:
    assert findings.broken(walked(tokenizer, taken(way, 0, digests=("z", "z"))), "float32") == []


@pytest.mark.parametrize("question", [0, 1])
@pytest.mark.parametrize("way", [ways.CHUNKED, ways.COPIED, ways.TORCH_LOAD])
def test_tokens_must_be_equal_in_float32(tokenizer: Any, way: str, question: int) -> None:
    found = walked(tokenizer, taken(way, question, tokens=(1, 3)))
    assert findings.broken(found, "bfloat16") == []
    (line,) = findings.broken(found, "float32")
    assert "other tokens" in line


def test_ratios_are_of_what_ran_together(tokenizer: Any) -> None:
    """A machine that slows down from round to round changes no ratio."""
    rounds = [
        replace(
            taken(way, question),
            round=number,
            asked={COPY: base, COMPUTE: base},
            prepared={LOAD: 1.0},
            answered=4 * base,
        )
        for number, speed in enumerate((1.0, 5.0, 2.0))
        for way, base in ((ways.COPIED, 3 * speed), (RECIPE, 2 * speed))
        for question in (0, 1)
    ]
    others = [taken(way, 0) for way in (ways.NEW, ways.TORCH_LOAD, ways.COLD, ways.CHUNKED, SINGLE)]
    found = findings.ratios([*rounds, *others])
    assert (found["question"].value, found["question"].low, found["question"].high) == (1.5, 1.5, 1.5)
    assert found["question_answer"].value == 1.5
    assert found["question"].met is False
    assert found["new_process"].met is True


def test_each_round_begins_with_another_one() -> None:
    assert [turned("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_clock_adds_up_by_kind() -> None:
    clock = Clock()
    assert clock.take(LOAD, lambda: 7) == 7
    clock.take(LOAD, lambda: sum(range(100_000)))
    clock.take(COMPUTE, lambda: None)
    assert set(clock.laps) == {LOAD, COMPUTE}
    assert clock.laps[LOAD] > clock.laps[COMPUTE] >= 0
    assert clock.cpu >= 0


# Documents and the model.


def rows_in(folder: Path, task: str, *texts: str) -> None:
    folder.mkdir(exist_ok=True)
    made = [
        {"_id": str(n), "dataset": task, "input": "?", "context": text, "answers": ["x"], "all_classes": None}
        for n, text in enumerate(texts)
    ]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def test_rows_of_about_that_length_are_taken_whole(tmp_path: Path, tokenizer: Any) -> None:
    rows_in(tmp_path, "qasper", "a short text " * 10, "a longer text " * 100)
    rows_in(tmp_path, "2wikimqa", "one " * 300, "and another one " * 1000)
    counts = [len(tokenizer(text).input_ids) for text in ("a short text " * 10, "one " * 300)]
    found = find_documents(str(tmp_path), counts, tokenizer, 10_000)
    assert [document.ids.shape[1] for document in found] == counts
    assert [document.name for document in found] == ["LongBench, qasper", "LongBench, 2wikimqa"]


def test_a_folder_without_rows(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(MissingData, match=r"There is no qasper\.jsonl"):
        find_documents(str(tmp_path), [100], tokenizer, 10_000)


@pytest.mark.parametrize("tokens", [300, 1000])
def test_made_up_text_has_about_that_length(tokenizer: Any, tokens: int) -> None:
    (document,) = find_documents("", [tokens], tokenizer, 10_000)
    assert 0.7 * tokens < document.ids.shape[1] < 1.5 * tokens
    assert len(set(document.questions)) == 2


@pytest.mark.parametrize("chat", [False, True])
def test_questions_go_on_from_the_document(tokenizer: Any, chat: bool) -> None:
    tokenizer = load_tokenizer(str(RECALL_TINY))
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
    document = make_document(tokenizer, "a text", "Once upon a time. " * 9, QUESTIONS)
    end = document.ids.shape[1]
    for prompt in document.prompts:
        assert prompt.shape[1] > end
        assert torch.equal(prompt[:, :end], document.ids)
    assert not torch.equal(document.prompts[0][:, : end + 9], document.prompts[1][:, : end + 9])


def test_the_package_with_the_model_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it wants a library that is not here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(real_model, "PACKAGE", package.name)
    assert real_model.gguf_file() is None
    (package / "weights.gguf").write_bytes(b"GGUF")
    assert real_model.gguf_file() == package / "weights.gguf"
    assert package.name not in sys.modules


def test_a_model_that_was_saved_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "PACKAGE", "no_such_package")
    (tmp_path / real_model.NAME).mkdir()
    with pytest.raises(ValueError, match="pip install"):
        real_model.real_model(tmp_path)
    (tmp_path / real_model.NAME / "config.json").write_text("{}")
    assert real_model.real_model(tmp_path) == str(tmp_path / real_model.NAME)


@pytest.mark.parametrize(("says", "words"), [("echo first >&2; echo why >&2", "why"), ("true", "exit code 3")])
def test_a_new_process_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, words: str
) -> None:
    failing = tmp_path / "python"
    failing.write_text(f"#!/bin/sh\n{says}\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    request = fresh.Request("model", "float32", 1, ways.NEW, str(tmp_path), [1, 2], [1, 2, 3], 1, 0)
    with pytest.raises(RuntimeError, match=f"{ways.NEW}' failed: {words}$"):
        fresh.ask_in_new_process(request)


# What is shown.


def printed(result: dict[str, Any], width: int) -> str:
    out = io.StringIO()
    for sheet in tables.sheets(result["documents"][0]):
        Console(file=out, width=width, highlight=False, markup=False, emoji=False).print(sheet)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_no_column_is_lost(result: dict[str, Any], width: int) -> None:
    shown = printed(result, width)
    for word in (*tables.HEADINGS, *tables.RATIO_HEADINGS, *WAYS.values()):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= width


def test_a_page_says_what_is_not_equal(result: dict[str, Any]) -> None:
    assert "Not equal" not in tables.page(result)
    assert "**Not equal:** one; two." in tables.page({**result, "broken": ["one", "two"]})


@pytest.mark.parametrize(("load", "busy"), [(None, False), (0.4, False), (1.0, False), (1.3, True), (9.0, True)])
def test_a_busy_machine_is_told(result: dict[str, Any], load: float | None, busy: bool) -> None:
    ran = {**result, "machine": {**result["machine"], "cores": 2, "load_average_before": load}}
    for text in (tables.page(ran), tables.readme(ran)):
        assert ("The machine was busy" in text) == busy


def test_answers_stand_beside_those_who_gave_them(result: dict[str, Any]) -> None:
    (document,) = result["documents"]
    said = json.loads(json.dumps(document))
    said["taken"][0]["text"] = "something else"
    (_, given), _ = tables.answers(said)
    assert dict(given)["something else"] == WAYS[said["taken"][0]["way"]]
    (_, given), *_ = tables.answers({**said, "taken": said["taken"][1:2]})
    assert [who for _, who in given] == ["all"]


def site(folder: Path) -> Path:
    """A place with pages to be filled."""
    (folder / "docs").mkdir()
    for name in ("README.md", "docs/walk.md"):
        (folder / name).write_text("# Page\n\n<!-- walk -->\nold\n<!-- end of walk -->\n\nThe end.\n")
    return folder


def test_pages_and_chart_are_made_from_a_result(result: dict[str, Any], tmp_path: Path) -> None:
    out, folder = tmp_path / "walk.json", site(tmp_path)
    out.write_text(json.dumps(result))
    for _ in range(2):  # again is the same
        assert command.main(["--chart", "--out", str(out), "--docs", str(folder)]) == 0
        page = (folder / "docs" / "walk.md").read_text()
        assert page == f"# Page\n\n<!-- walk -->\n{tables.page(result)}\n<!-- end of walk -->\n\nThe end.\n"
        assert tables.readme(result) in (folder / "README.md").read_text()
    assert_chart_shows(folder / "docs" / "walk.svg", result)


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    with pytest.raises(ValueError, match="0 places"):
        tables.fill(page, "text")


def assert_chart_shows(svg: Path, result: dict[str, Any]) -> None:
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text(encoding="utf-8"))
    document = tables.longest(result)
    for way in (*chart.FIRST, *chart.LATER):
        assert WAYS[way] in texts
        assert chart.shown(sum(chart.parts_of(document, way).values())) in texts
    assert {*chart.MEANING.values(), "seconds to the first token, median"} <= set(texts)
    assert any(f"{document['tokens']:,} tokens" in text for text in texts)


def test_the_committed_tables_match_the_committed_result() -> None:
    """README, page and chart are those that `python -m eval.walk --chart` makes of eval/walk.json."""
    measured = command.read(command.RESULT)
    assert tables.page(measured) in (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    assert tables.readme(measured) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert_chart_shows(ROOT / "docs" / "walk.svg", measured)
    assert measured["broken"] == []
