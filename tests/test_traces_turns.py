"""Several questions about one document: where they come from, what each method answers, and what a new method needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.traces import turns as turns_module
from benchmarks.traces.comparing import compare
from benchmarks.traces.pressing import pressing
from benchmarks.traces.questions import SHOTS, Document, documents_of, gathered, many_shot
from benchmarks.traces.turns import METHODS, Answered, Turn, method
from cake_hf.cli.models import RECALL_TINY, load_model, load_tokenizer
from cake_hf.presses import EPIC, LESS, ThinK
from commands import run_benchmark
from eval.data.encode import Encoder
from eval.data.prompts import load_templates
from eval.data.rows import Row, parse_record
from eval.data.sources import Source, load_rows
from eval.tasks import find_task

TREC = "".join(f"Question: What is {n} ?\nType: kind {n}\n" for n in range(6))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(RECALL_TINY))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(str(RECALL_TINY), "float32", "cpu")


def scbench(turns: int = 3, context: str = "one two three four\n" * 8) -> list[Row]:
    record = {
        "id": "x",
        "context": context,
        "multi_turns": [{"input": f"What is {n}?", "answer": f"number {n}"} for n in range(turns)],
    }
    return parse_record(find_task("scbench_kv"), record, 0)


def found(rows: Sequence[Row], tokenizer: Any, limit: int = 4096, task: str = "scbench_kv") -> list[Document]:
    encoder = Encoder(tokenizer, limit, truncate=False, new_tokens=4)
    return list(documents_of(find_task(task), rows, load_templates()[task], encoder))


# Questions.


def test_scbenchs_turns_share_their_document(tokenizer: Any) -> None:
    rows = scbench()
    [document] = found(rows, tokenizer)
    assert document.rows == tuple(rows)
    shared = tokenizer.decode(document.ids[0])
    assert rows[0].document.strip() in shared
    told = [tokenizer.decode(turn.ids[0]) for turn in document.turns]
    # The turns before, with their right answers, belong to a turn's own part.
    assert "number 0" not in told[0]
    assert "number 0" in told[1]
    assert "number 1" in told[2]
    assert [turn.new_tokens for turn in document.turns] == [4, 4, 4]


def test_turns_that_do_not_fit_and_lonely_questions_are_left_out(tokenizer: Any) -> None:
    [whole] = found(scbench(), tokenizer)
    longest = whole.ids.shape[1] + whole.turns[1].ids.shape[1] + 4
    [shorter] = found(scbench(), tokenizer, longest)
    assert len(shorter.turns) == 2
    assert found(scbench(), tokenizer, longest - whole.turns[1].ids.shape[1]) == []
    assert found(scbench(1), tokenizer) == []
    two = [*scbench(2), *scbench(2, "something else altogether\n" * 8)]
    assert len(found(two, tokenizer)) == 2


def test_examples_become_questions() -> None:
    row = Row("trec", "a", TREC, "Question: What is it ?\nType:", ("kind",), ("kind 4", "kind 5"))
    asked = many_shot(row, 2, 10_000)
    assert [one.question for one in asked] == ["Question: What is 4 ?\nType:", "Question: What is 5 ?\nType:"]
    assert [one.answers for one in asked] == [("kind 4",), ("kind 5",)]
    assert asked[1].history == ((asked[0].question, "kind 4"),)
    assert {one.document for one in asked} == {TREC[: TREC.index("Question: What is 4")]}
    assert {one.classes for one in asked} == {row.classes}
    [document] = {one.document for one in many_shot(row, 2, 80)}
    assert document == TREC[TREC.index("Question: What is 2") : TREC.index("Question: What is 4")]
    assert many_shot(row, 6, 10_000) == many_shot(row, 2, 10) == []


def test_questions_about_several_documents_become_turns_about_one(tokenizer: Any) -> None:
    filler = "One two three four. " * 40
    rows = [Row("hotpotqa", name, f"{filler}It was {name}. {filler}", f"Who, {name}?", (name,)) for name in "ABCDE"]
    asked = gathered(tokenizer, find_task("hotpotqa"), rows, 2, 80)
    assert [one.document for one in asked[::2]] == [one.document for one in [*asked[1::2], asked[4]]]
    assert [[f"was {name}." in one.document for name in "ABCDE"] for one in asked[::2]] == [
        [True, True, False, False, False],
        [False, False, True, True, False],
        [False, False, False, False, True],
    ]
    assert [one.history for one in asked] == [(), (("Who, A?", "A"),), (), (("Who, C?", "C"),), ()]
    assert [len(one.turns) for one in found(asked, tokenizer, task="hotpotqa")] == [2, 2]


@pytest.mark.parametrize("task", SHOTS)
def test_every_kind_of_example_is_cut_where_its_answer_begins(task: str) -> None:
    begin, mark = SHOTS[task]
    text = "".join(f"{begin} some text {n}{mark} answer {n}\n" for n in range(4))
    asked = many_shot(Row(task, "a", text, "", ("",)), 2, 1000)
    assert [one.answers[0] for one in asked] == ["answer 2", "answer 3"]
    assert all(one.question.endswith(mark) for one in asked)


# Methods.


def test_all_methods_answer_all_turns(model: Any, tokenizer: Any) -> None:
    numbers = torch.Generator().manual_seed(1)
    document = torch.randint(3, 1000, (1, 300), generator=numbers)
    turns = [Turn(torch.randint(3, 1000, (1, 9), generator=numbers), 3) for _ in range(2)]
    answered = {name: one(model, document, turns) for name, one in METHODS.items()}
    assert {"computed anew", "DynamicCache, copied", "cake_hf, cold", "cake_hf, warm", "cake_hf, in memory"} <= set(
        answered
    )
    for one in answered.values():
        assert [len(tokens) for tokens in one.answers] == [3, 3]
        assert all(ttft > 0 for ttft in one.ttfts)
        assert len(one.ttfts) == 2
    ours = [one.answers for name, one in answered.items() if name.startswith("cake_hf")]
    assert ours == [ours[0]] * 3


def test_the_document_counts_for_the_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        tokens, ttft = torch.tensor([5]), 0.25

    seconds = iter([("held", 8.0), ("copy", 2.0), ("copy", 1.0)])
    monkeypatch.setattr(turns_module, "timed", lambda work: next(seconds))
    monkeypatch.setattr(turns_module, "ask", lambda *arguments, **options: Asked())
    ended: list[Any] = []
    steps = turns_module.Steps(make=lambda held: held, end=ended.append)
    turn = Turn(torch.tensor([[1]]), 1)
    assert steps.run(None, torch.tensor([[1]]), [turn, turn]) == Answered(((5,), (5,)), (10.25, 1.25))
    assert ended == ["held"]


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "METHODS", {})

    @method("mine")
    def mine(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
        return Answered((), ())

    assert {"mine": mine} == turns_module.METHODS
    with pytest.raises(ValueError, match="method 'mine' already"):
        method("mine")(mine)


# Comparing.


def test_methods_are_scored_and_timed_turn_by_turn(tokenizer: Any) -> None:
    documents = found(scbench(), tokenizer)
    order: list[str] = []

    def answering(name: str, text: str, ttft: float) -> Any:
        def answer(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
            order.append(name)
            ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
            return Answered((ids,) * len(turns), (10 * ttft, *[ttft] * (len(turns) - 1)))

        return answer

    methods = {"slow": answering("slow", "number 1", 2.0), "quick": answering("quick", "nothing", 0.5)}
    result = compare(None, tokenizer, find_task("scbench_kv"), documents * 2, methods)
    assert order == ["slow", "quick", "quick", "slow"]
    rows = result.details["methods"]
    assert rows["slow"]["score"] == pytest.approx(1 / 3)  # type: ignore[index]
    assert rows["quick"]["score"] == 0  # type: ignore[index]
    assert rows["quick"]["ttfts"] == [5.0, 0.5, 0.5]  # type: ignore[index]
    assert result.figures["quick"].value == 0.25
    with pytest.raises(ValueError, match="no document with two questions"):
        compare(None, tokenizer, find_task("scbench_kv"), [], methods)


def test_the_command_asks_and_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
        return Answered(((5,),) * len(turns), (1.0,) * len(turns))

    monkeypatch.setattr(turns_module, "METHODS", {"one": nothing, "another": nothing})
    row = {
        "_id": "a",
        "dataset": "trec",
        "input": "",
        "context": TREC,
        "answers": ["kind 1"],
        "all_classes": ["kind 4"],
    }
    (tmp_path / "trec.jsonl").write_text(json.dumps(row) + "\n")
    out, page = tmp_path / "turns.json", tmp_path / "page.md"
    run = run_benchmark("traces", "turns", "--task", "trec", "--data", tmp_path, "--turns", 2, "--out", out)
    assert run.exit_code == 0, run.output
    page.write_text("<!-- traces turns -->\n<!-- end of traces turns -->\n")
    assert run_benchmark("traces", "page", out, out, "--page", page).exit_code == 0
    assert page.read_text().count("### trec: 1 documents") == 2
    assert "| another | 0.0 | 0.0 | 0.0 | 1.000 | 1.000 |" in page.read_text()
    options = ["--task", "trec", "--data", tmp_path, "--method", "another", "--processor", "--out", out]
    assert run_benchmark("traces", "turns", *options).exit_code == 0
    assert run_benchmark("traces", "page", out, "--page", page).exit_code == 0
    assert "| one |" not in page.read_text()
    assert "Seconds are those of the processor." in page.read_text()


def test_other_papers_methods_answer_all_turns(model: Any, tokenizer: Any) -> None:
    rows = load_rows(find_task("recall"), Source("generated", rows=2, chars=1500)).rows
    document = found(rows, tokenizer, task="recall")[0]
    right = METHODS["cake_hf, warm"](model, document.ids, document.turns).answers
    for press, same in ((ThinK(0), True), (EPIC(300), True), (LESS([], 0.02), False)):
        answered = pressing(press)(model, document.ids, document.turns)
        assert len(answered.answers) == len(answered.ttfts) == len(document.turns)
        assert all(ttft > 0 for ttft in answered.ttfts)
        assert (answered.answers == right) is same


def test_turns_may_be_timed_by_the_processor(model: Any) -> None:
    context, turn = copy_context(), Turn(torch.tensor([[5, 6]]), 1)
    context.run(turns_module.CLOCK.set, iter(range(100)).__next__)
    assert context.run(METHODS["computed anew"], model, torch.tensor([[7, 8]]), [turn]).ttfts == (3,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "nothing"], "Unknown task 'nothing'"),
        (["--tokens", 10**6], "choose fewer --tokens"),
        (["--method", "mine"], "There is no method 'mine'"),
        (["--task", "qasper", "--data", "generated"], "no document with two questions"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: list[object], words: str) -> None:
    run = run_benchmark("traces", "turns", *options, "--chars", 100, "--rows", 1)
    assert run.exit_code == 2
    assert words in " ".join(run.output.split())
