"""Rows of every benchmark from files, from the Hub (a stand-in), and of our own; and how they become prompts."""

from __future__ import annotations

import json
import os
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cake_hf.assets import RECALL_TINY
from cake_hf.cli.models import load_tokenizer
from eval.data.encode import Encoder, TooLong
from eval.data.generated import generate
from eval.data.prompts import OWN_PROMPTS, BrokenPrompts, Template, load_templates
from eval.data.rows import BrokenRow, Row, parse_record
from eval.data.sources import CONVERTED, MissingData, Source, load_rows
from eval.tasks import TASKS, UnknownTask, find_task

REAL_ROWS = os.environ.get("CAKE_HF_LONGBENCH", "")
"""A folder with real LongBench rows; the tests make their own and look at these only where there are some."""

HOTPOT = find_task("hotpotqa")
EVERY_TASK = pytest.mark.parametrize("name", TASKS)


def record(number: int, context: str = "a text", **changed: object) -> dict[str, Any]:
    plain = {"_id": f"r{number}", "dataset": "hotpotqa", "input": f"q{number}?", "context": context, "answers": ["x"]}
    return {**plain, "language": "en", "all_classes": None, "length": 2, **changed}


def write_lines(path: Path, *records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(RECALL_TINY))


# From files.


@pytest.mark.parametrize("place", ["hotpotqa.jsonl", "data/hotpotqa.jsonl"])
def test_rows_from_json_lines(tmp_path: Path, place: str) -> None:
    write_lines(tmp_path / place, record(0), record(1, answers=["x", "y"], all_classes=["x", "z"]))
    found = load_rows(HOTPOT, Source(str(tmp_path)))
    assert found.skipped == {}
    assert found.rows == [
        Row("hotpotqa", "r0", "a text", "q0?", ("x",)),
        Row("hotpotqa", "r1", "a text", "q1?", ("x", "y"), ("x", "z")),
    ]


@pytest.mark.parametrize("place", ["hotpotqa.parquet", "hotpotqa/test-00000-of-00001.parquet"])
def test_rows_from_parquet(tmp_path: Path, place: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / place).parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([record(0), record(1)]), tmp_path / place)
    found = load_rows(HOTPOT, Source(str(tmp_path)))
    assert [(row.id, row.answers, row.classes) for row in found.rows] == [("r0", ("x",), None), ("r1", ("x",), None)]


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "hotpotqa.parquet").write_text("no parquet")
    with pytest.raises(MissingData, match="download it again"):
        load_rows(HOTPOT, Source(str(tmp_path)))


def test_broken_rows_are_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    no_answers = record(3)
    del no_answers["answers"]
    write_lines(
        tmp_path / "hotpotqa.jsonl",
        record(0),
        '{"_id": "cut off',
        "[]",
        no_answers,
        record(4, context=None),
        record(5, answers="x"),
        record(6, dataset="qasper"),
        "",
        record(7),
    )
    found = load_rows(HOTPOT, Source(str(tmp_path)))
    assert [row.id for row in found.rows] == ["r0", "r7"]
    reasons = ["not JSON", "not a JSON object", "no 'answers'", "'context' is not a text", "not a list", "'qasper'"]
    assert list(found.skipped) == [f"record {number}" for number in range(1, 7)]
    for reason, words in zip(found.skipped.values(), reasons, strict=True):
        assert words in reason


def test_rows_about_one_document_come_one_after_another(tmp_path: Path) -> None:
    write_lines(tmp_path / "hotpotqa.jsonl", *(record(n, context="abcab"[n]) for n in range(5)))
    assert [row.id for row in load_rows(HOTPOT, Source(str(tmp_path))).rows] == ["r0", "r3", "r1", "r4", "r2"]
    assert [row.id for row in load_rows(HOTPOT, Source(str(tmp_path), rows=2)).rows] == ["r0", "r1"]


def test_missing_rows_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"no hotpotqa\.jsonl .* leave --data away .*zai-org/LongBench"):
        load_rows(HOTPOT, Source(str(tmp_path)))


def test_longbench_v2(tmp_path: Path) -> None:
    task = find_task("longbench-v2")
    choices = {f"choice_{letter}": f"it is {letter}" for letter in "ABCD"}
    good = {"_id": "a", "question": "Which?", **choices, "answer": "C", "context": "text", "difficulty": "easy"}
    (tmp_path / "data.json").write_text(json.dumps([good, {**good, "answer": "E"}, {**good, "choice_B": None}]))
    found = load_rows(task, Source(str(tmp_path)))
    question = "Which?\n(A) it is A\n(B) it is B\n(C) it is C\n(D) it is D"
    assert found.rows == [Row("longbench-v2", "a", "text", question, ("C",))]
    assert len(found.skipped) == 2


def test_scbench_turns_share_their_context(tmp_path: Path) -> None:
    task = find_task("scbench_qa_eng")
    turns = [
        {"input": "one?", "answer": "1"},
        {"input": "two?", "answer": ["2", "two"]},
        {"input": "three?", "answer": 3},
    ]
    write_lines(tmp_path / "scbench_qa_eng.jsonl", {"id": 7, "context": "text", "multi_turns": turns}, {"id": 8})
    found = load_rows(task, Source(str(tmp_path)))
    assert [(row.id, row.question, row.answers) for row in found.rows] == [
        ("7/0", "one?", ("1",)),
        ("7/1", "two?", ("2", "two")),
        ("7/2", "three?", ("3",)),
    ]
    assert found.rows[2].history == (("one?", "1"), ("two?", "2"))
    assert found.skipped == {"record 1": "it has no 'multi_turns'"}


def test_scbench_choices_are_shown() -> None:
    turn = {"input": "Which?", "answer": "B", "options": ["red", "blue"]}
    (row,) = parse_record(find_task("scbench_choice_eng"), {"id": 0, "context": "t", "multi_turns": [turn]}, 0)
    assert row.question == "Which?\n(A) red\n(B) blue"
    with pytest.raises(BrokenRow, match="answer"):
        parse_record(find_task("scbench_kv"), {"id": 0, "context": "t", "multi_turns": [{"input": "x"}]}, 0)


@EVERY_TASK
def test_generated_rows_have_the_tasks_schema(name: str) -> None:
    task = TASKS[name]
    source = Source("generated", rows=3, chars=400)
    found = load_rows(task, source)
    assert found.skipped == {}
    assert len({row.id for row in found.rows}) == len(found.rows) >= 3
    assert found.rows[0].document == found.rows[1].document != found.rows[-1].document
    assert load_rows(task, source).rows == found.rows
    assert bool(found.rows[0].classes) == (task.metric == "classification")


def test_generated_rows_differ_by_seed() -> None:
    first, second = (next(generate(HOTPOT, 1, seed, 400))["context"] for seed in (0, 1))
    assert first != second


@pytest.mark.skipif(not REAL_ROWS, reason="set CAKE_HF_LONGBENCH to a folder with real rows")
def test_downloaded_rows_load_and_fit_the_limit(tokenizer: Any) -> None:
    encoder, templates = Encoder(tokenizer, limit=2048), load_templates()
    names = [name for name in TASKS if (Path(REAL_ROWS) / f"{name}.jsonl").is_file()]
    assert names
    for name in names:
        found = load_rows(TASKS[name], Source(REAL_ROWS))
        assert found.skipped == {}
        for row in found.rows[:3]:
            assert len(encoder.prompt(TASKS[name], templates[name], row).ids) <= 2048


# From the Hub, or rather from what stands in for it.


class FakeHub:
    """Notes what `datasets.load_dataset` is asked for, and has what it was told to have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *available: str) -> None:
        self.asked: list[tuple[tuple[str, ...], dict[str, str]]] = []
        self.available = available
        fake: Any = types.ModuleType("datasets")
        fake.load_dataset = self.load
        monkeypatch.setitem(sys.modules, "datasets", fake)

    def load(self, *arguments: str, **options: str) -> list[dict[str, Any]]:
        self.asked.append((arguments, options))
        if options.get("revision", "main") not in self.available:
            raise RuntimeError("Dataset scripts are no longer supported\nand more")
        return [record(0)]


def test_a_parquet_mirror_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, "main")
    assert [row.id for row in load_rows(HOTPOT, Source(hub="someone/LongBench")).rows] == ["r0"]
    assert hub.asked == [(("someone/LongBench", "hotpotqa"), {"split": "test"})]


def test_the_hubs_own_parquet_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, CONVERTED)
    assert len(load_rows(HOTPOT, Source()).rows) == 1
    assert hub.asked[-1] == (("zai-org/LongBench", "hotpotqa"), {"split": "test", "revision": CONVERTED})


def test_rows_are_read_from_the_original_archive_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps(record(0)) + "\n" + json.dumps(record(1)))
    asked = []

    def download(*arguments: str, **options: str) -> str:
        asked.append((arguments, options))
        return str(tmp_path / "data.zip")

    FakeHub(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert [row.id for row in load_rows(HOTPOT, Source()).rows] == ["r0", "r1"]
    assert asked == [(("zai-org/LongBench", "data.zip"), {"repo_type": "dataset"})]


def test_the_other_suites_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, "main")
    for name in ("longbench-v2", "scbench_kv"):
        found = load_rows(find_task(name), Source())  # the stand-in's record has another schema
        assert len(found.skipped) == 1
    assert hub.asked == [
        (("zai-org/LongBench-v2",), {"split": "train"}),
        (("microsoft/SCBench", "scbench_kv"), {"split": "test"}),
    ]


def test_no_way_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch)
    with pytest.raises(
        MissingData, match=r"pass --data FOLDER .* Tried: its train split: Dataset scripts are no longer"
    ):
        load_rows(find_task("longbench-v2"), Source())


# Prompts.


@EVERY_TASK
def test_every_task_has_a_prompt_with_the_document_first(name: str) -> None:
    template = load_templates()[name]
    assert template.first.index("{context}") < template.first.find("{input}") or "{input}" not in template.first
    (said,) = template.messages(Row(name, "0", "DOCUMENT {x}", "QUESTION", ("A",)))
    assert "DOCUMENT {x}" in said


def test_prompts_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        'hotpotqa: "{context} {{so}} {input}?"\nscbench_kv: {first: "{context}: {input}", next: "and {input}"}\n'
    )
    templates = load_templates(path)
    assert templates["hotpotqa"].messages(Row("hotpotqa", "0", "D", "Q", ())) == ["D {so} Q?"]
    later = Row("scbench_kv", "0", "D", "Q3", (), history=(("Q1", "A1"), ("Q2", "A2")))
    assert templates["scbench_kv"].messages(later) == ["D: Q1", "A1", "and Q2", "A2", "and Q3"]
    assert templates["qasper"] == load_templates()["qasper"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hotpotqa: 'no place'", "needs \\['context'\\]"),
        ("hotpotqa: '{context} {question}'", "placeholders \\['context', 'question'\\]"),
        ("hotpotqa: '{context} {'", "write a literal brace twice"),
        ("hotpotqa: 3", "is not a text"),
        ("hotpotqa: {then: '{context}'}", "it needs first"),
        ("hotpotqa: {first: '{context}', next: '{context}{input}'}", "may have \\['input'\\]"),
        ("- hotpotqa", "no mapping"),
        ("hotpotqa: '", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BrokenPrompts, match=words):
        load_templates(tmp_path / "mine.yaml")


def test_prompts_of_an_unknown_task(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("quasper: '{context}'")
    with pytest.raises(UnknownTask, match="known are"):
        load_templates(tmp_path / "mine.yaml")
    with pytest.raises(BrokenPrompts, match="cannot be read"):
        load_templates(tmp_path / "nowhere.yaml")
    assert OWN_PROMPTS.is_file()


# Tokens.

ROW = Row("hotpotqa", "0", "one two three four five. " * 40, "why?", ("x",))
TEMPLATE = Template("Read.\n{context}\nQuestion: {input}\nAnswer:", "Question: {input}\nAnswer:")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}!{% endif %}{% endif %}"
)


@pytest.fixture
def chatty() -> Any:
    tokenizer = load_tokenizer(str(RECALL_TINY))
    tokenizer.chat_template = CHAT
    return tokenizer


def test_a_short_prompt_is_left_whole(tokenizer: Any) -> None:
    prompt = Encoder(tokenizer, limit=None).prompt(HOTPOT, TEMPLATE, ROW)
    assert tokenizer.decode(prompt.ids) == f"Read.\n{ROW.document}\nQuestion: why?\nAnswer:"
    assert (prompt.cut, prompt.new_tokens) == (0, HOTPOT.new_tokens)


def test_the_chat_template_is_for_tasks_that_take_it(chatty: Any) -> None:
    encoder = Encoder(chatty, limit=None)
    asked = f"Read.\n{ROW.document}\nQuestion: why?\nAnswer:"
    assert chatty.decode(encoder.prompt(HOTPOT, TEMPLATE, ROW).ids) == f"<user>{asked}</user><assistant>!"
    for name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"):
        assert chatty.decode(encoder.prompt(find_task(name), TEMPLATE, ROW).ids) == asked


def test_turns_with_and_without_a_chat_template(tokenizer: Any, chatty: Any) -> None:
    task = find_task("scbench_kv")
    row = Row("scbench_kv", "0", "D", "Q2", (), history=(("Q1", "A1"),))
    first = "Read.\nD\nQuestion: Q1\nAnswer:"
    plain = tokenizer.decode(Encoder(tokenizer, None).prompt(task, TEMPLATE, row).ids)
    assert plain == f"{first} A1\n\nQuestion: Q2\nAnswer:"
    chat = chatty.decode(Encoder(chatty, None).prompt(task, TEMPLATE, row).ids)
    assert chat == f"<user>{first}</user><assistant>A1</assistant><user>Question: Q2\nAnswer:</user><assistant>!"


@pytest.mark.parametrize("limit", [60, 61, 100, 200])
def test_a_long_prompt_loses_its_middle(chatty: Any, limit: int) -> None:
    prompt = Encoder(chatty, limit, new_tokens=8).prompt(HOTPOT, TEMPLATE, ROW)
    text = chatty.decode(prompt.ids)
    assert limit - 12 < len(prompt.ids) <= limit - 8  # nothing more is cut than has to be
    assert text.startswith("<user>Read.\none two")
    assert text.endswith("Question: why?\nAnswer:</user><assistant>!")
    whole = Encoder(chatty, None).prompt(HOTPOT, TEMPLATE, ROW)
    assert prompt.cut == len(whole.ids) - len(prompt.ids)


def test_a_cut_within_a_character_still_fits(tokenizer: Any) -> None:
    row = Row("multifieldqa_zh", "0", "请阅读下面的文字" * 60, "为什么", ("x",))
    for limit in range(120, 140):
        prompt = Encoder(tokenizer, limit, new_tokens=8).prompt(find_task("multifieldqa_zh"), TEMPLATE, row)
        assert len(prompt.ids) <= limit - 8


def test_rows_that_do_not_fit(tokenizer: Any) -> None:
    with pytest.raises(TooLong, match=r"has \d+ tokens and up to 32 new ones, the limit is 100"):
        Encoder(tokenizer, limit=100, truncate=False).prompt(HOTPOT, TEMPLATE, ROW)
    with pytest.raises(TooLong, match="cannot be cut"):
        Encoder(tokenizer, limit=33).prompt(HOTPOT, TEMPLATE, ROW)
    with pytest.raises(TooLong, match="cannot be cut to the 0"):
        Encoder(tokenizer, limit=10).prompt(HOTPOT, TEMPLATE, ROW)


def test_rows_of_one_document_share_their_prefix(tokenizer: Any) -> None:
    rows = load_rows(find_task("recall"), Source(rows=2, chars=3000)).rows
    template, encoder = load_templates()["recall"], Encoder(tokenizer, None)
    one, other = (encoder.prompt(find_task("recall"), template, row).ids for row in rows)
    same = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    assert same > 0.95 * len(one)
