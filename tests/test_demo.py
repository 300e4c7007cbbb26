"""The demonstration from end to end in small, and that it would notice if a single bit were wrong."""

from __future__ import annotations

import io
import random
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cake_hf import CakeCache, CakeError, LocalStore, Report
from cake_hf.assets import RECALL_TINY
from cake_hf.cli.sheets import Bar, Bars, Lanes
from cake_hf.report import Span
from demo.__main__ import app
from demo.asking import Answer, ask_plainly, ask_with_store
from demo.pictures import show_race
from demo.play import judge, refuse_unrestored
from demo.race import STRATEGIES, Race, run_race
from demo.task import make_task
from demo.worker import Request, ask_in_fresh_process, main
from models import CHUNK, VOCABULARY, prompt, shared_model

NEW_TOKENS = 4


@pytest.fixture(scope="module")
def oracle() -> Answer:
    return ask_plainly(shared_model("llama"), prompt(), NEW_TOKENS, CHUNK)


def with_store(store: Path, strategy: str = "both", new_tokens: int = NEW_TOKENS) -> Answer:
    model = shared_model("llama")
    return ask_with_store(model, prompt(), new_tokens, CakeCache(model, store, chunk_size=CHUNK, strategy=strategy))


def printed(*renderables: object, width: int = 60) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fresh processes, the oracle and the race: the same answers and logits in all of them."""
    monkeypatch.setenv("COLUMNS", "120")
    store = tmp_path / "store"
    arguments = ["--tokens", "1200", "--chunk-size", "128", "--repeats", "1", "--store", str(store)]
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    assert "All runs gave the same answer" in result.output
    assert result.output.count(" equal ") == 3  # cold, warm and the verdict
    for told in ("recall-tiny", "right answer", "warm process", "compute only", "load only", "both ends"):
        assert told in result.output
    with LocalStore(store) as kept:
        assert len(list(kept.keys())) == 9


def test_the_task_hides_its_answer_in_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(RECALL_TINY)
    task = make_task(tokenizer, None, "", 600)
    text = tokenizer.decode(task.ids[0])
    assert text.endswith(task.question)
    assert text.count(task.question.replace("recall", "remember") + task.answer) == 1
    assert 600 < task.ids.shape[1] < 700


def test_the_task_takes_the_user_s_text_and_question() -> None:
    tokenizer = AutoTokenizer.from_pretrained(RECALL_TINY)
    task = make_task(tokenizer, "def sum(a, b):\n    return a + b\n" * 9, "What does it return?", None)
    assert tokenizer.decode(task.ids[0]).endswith("return a + b\n\n\nQuestion: What does it return?\nAnswer:")
    assert task.answer == ""
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<model>"
    chat = make_task(tokenizer, "Some text.", "What?", None)
    assert tokenizer.decode(chat.ids[0]) == "<user>Some text.\n\nWhat?</user><model>"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--question", "Why?"], "A --question needs the text"),
        (["--tokens", "20"], "not more than two chunks"),
        (["--tokens", "40000"], "choose fewer --tokens"),
        (["--file", "/nowhere/text"], "cannot be read"),
        (["--model", "/nowhere/model"], "There is no folder"),
    ],
)
def test_unusable_demo_options_are_refused(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 2, result.output
    assert complaint in result.stderr
    assert "Traceback" not in result.output


def test_a_failing_process_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "Warning: whatever\nThe store cannot be made: no space left."
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr=complaint)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    request = Request("m", "auto", "cpu", "s", CHUNK, 1, "both", 1)
    with pytest.raises(
        CakeError, match=r"^A fresh process could not answer: The store cannot be made: no space left\.$"
    ):
        ask_in_fresh_process(request, prompt(), tmp_path / "work")


def test_a_worker_complains_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request("/nowhere/model", "auto", "cpu", str(tmp_path), CHUNK, 1, "both", torch.get_num_threads())
    request.write(tmp_path / "work", prompt())
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / "work")])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("There is no folder")


def test_cold_warm_and_race_agree_with_the_oracle(tmp_path: Path, oracle: Answer) -> None:
    cold, warm = with_store(tmp_path, "compute"), with_store(tmp_path)
    assert (cold.report.chunks_loaded, cold.report.chunks_saved) == (0, 8)
    assert warm.report.chunks_missed == 0
    assert warm.ttft > 0
    race = Race(1.0)
    for strategy in STRATEGIES:
        race.runs[strategy].append(with_store(tmp_path, strategy, new_tokens=1))
    assert judge(oracle, [cold, warm], race).good


def test_a_single_wrong_bit_is_noticed(oracle: Answer) -> None:
    """The negative control of everything the demonstration claims."""
    assert judge(oracle, [oracle], Race(1.0)).good
    logits = oracle.logits.clone()
    logits[-1, 3] = torch.nextafter(logits[-1, 3], torch.tensor(torch.inf))
    other = replace(oracle, logits=logits)
    assert not judge(oracle, [oracle, other], Race(1.0)).logits
    raced = Race(1.0)
    raced.runs["both"].append(replace(oracle, tokens=oracle.tokens[:1], logits=oracle.logits[:1] + 1))
    assert not judge(oracle, [oracle], raced).good
    tokens = (oracle.tokens + 1) % VOCABULARY
    assert not judge(oracle, [replace(oracle, tokens=tokens)], Race(1.0)).answers


def test_minus_zero_is_not_zero() -> None:
    zero, minus = (Answer(torch.zeros(1), torch.tensor([[sign * 0.0]]), 1.0) for sign in (1, -1))
    assert torch.equal(zero.logits, minus.logits)
    assert not zero.same_logits(minus)
    assert zero.same_logits(zero)


def test_a_demonstration_that_differs_exits_with_one(
    tmp_path: Path, oracle: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.play.ask_in_fresh_process", lambda *_: wrong)
    monkeypatch.setattr("demo.play.warm_up", lambda *_: None)
    monkeypatch.setattr("demo.play.ask_plainly", lambda *_: oracle)
    monkeypatch.setattr("demo.play._race", lambda *_: race)
    race = Race(
        1.0,
        {strategy: [replace(oracle, tokens=oracle.tokens[:1], logits=oracle.logits[:1])] for strategy in STRATEGIES},
    )
    wrong = replace(oracle, logits=oracle.logits + 1, report=Report(chunks_loaded=1, bytes_loaded=1))
    result = CliRunner().invoke(app, ["--tokens", "600", "--chunk-size", "128", "--store", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "The logits differ" in result.output


@pytest.mark.parametrize(
    ("report", "refused"),
    [
        (Report(chunks_computed=4), ""),  # a fast model has computed all before the first load was done
        (Report(chunks_loaded=1, chunks_computed=3, chunks_failed=1), ""),
        (Report(chunks_computed=4, chunks_missed=4), "the store failed"),
        (Report(chunks_computed=4, chunks_failed=1), "the store failed"),
        (Report(reason="a reason"), "a reason"),
    ],
)
def test_a_warm_process_is_refused_that_could_load_nothing(oracle: Answer, report: Report, refused: str) -> None:
    with pytest.raises(CakeError, match=f"not load anything: {refused}") if refused else nullcontext():
        refuse_unrestored(oracle, replace(oracle, report=report))


def test_an_answer_survives_the_way_between_processes(tmp_path: Path, oracle: Answer) -> None:
    spans = [Span("compute", 0, 0.0, 0.25, "computed"), Span("load-0", 1, 0.0, 0.125, "loaded")]
    answer = replace(oracle, report=Report(tokens=99, chunks_loaded=1, timeline=spans))
    answer.save(tmp_path)
    back = Answer.load(tmp_path)
    assert back.same_logits(answer)
    assert torch.equal(back.tokens, answer.tokens)
    assert (back.ttft, back.report) == (answer.ttft, answer.report)


def test_the_race_balances_both_sides(tmp_path: Path) -> None:
    """At the bandwidth it chooses, reading every chunk takes as long as the first run's computing did."""
    model, ids = shared_model("llama"), prompt()
    with_store(tmp_path)
    steps: list[tuple[int, int]] = []
    with LocalStore(tmp_path) as store:
        race = run_race(model, ids, store, CHUNK, 1000.0, 2, lambda done, total: steps.append((done, total)))
    assert steps == [(count, 6) for count in range(1, 7)]
    assert [len(race.runs[strategy]) for strategy in STRATEGIES] == [2, 2, 2]
    spans = [span for span in race.runs["compute"][0].report.timeline if span.chunk >= 0]
    assert 8 * 1000.0 / race.bytes_per_second == pytest.approx(sum(span.end - span.start for span in spans))
    assert [run.report.chunks_loaded for run in race.runs["compute"]] == [0, 0]
    assert [run.report.chunks_computed for run in race.runs["load"]] == [0, 0]
    assert all(run.report.chunks_saved == 0 for run in race.answers)


def test_a_race_that_takes_long_has_one_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.race.RACE_SECONDS", 0.0)
    with_store(tmp_path)
    with LocalStore(tmp_path) as store:
        race = run_race(shared_model("llama"), prompt(), store, CHUNK, 1000.0, 5, lambda done, total: None)
    assert [len(race.runs[strategy]) for strategy in STRATEGIES] == [1, 1, 1]


def test_medians_and_gain(oracle: Answer) -> None:
    race = Race(1.0)
    for strategy, seconds in (("compute", (9, 3, 4)), ("load", (5, 6, 7)), ("both", (2, 1, 9))):
        race.runs[strategy] = [replace(oracle, ttft=float(value)) for value in seconds]
    assert [race.seconds(strategy) for strategy in STRATEGIES] == [4, 6, 2]
    assert race.gain == 2
    assert race.middle_run("both").ttft == 2


@pytest.mark.parametrize("loaded", [0, 3])
def test_a_race_in_which_nothing_was_loaded_shows_no_gain(
    oracle: Answer, loaded: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run was slow, and set a bandwidth at which no load was worth its wait."""
    race = Race(1.0)
    for strategy, seconds in (("compute", 15.0), ("load", 16.0), ("both", 0.8)):
        report = Report(chunks_computed=8 - loaded, chunks_loaded=loaded)
        race.runs[strategy] = [replace(oracle, ttft=seconds, report=report)]
    show_race(race)
    said = capsys.readouterr().out
    assert ("No chunk was loaded" in said) == (not loaded)
    assert ("x" in said.split("both ends")[-1].splitlines()[0]) == bool(loaded)


def test_lanes_fill_the_width_and_fit_it() -> None:
    spans = [
        Span("compute", 0, 0.0, 1.0, "computed"),
        Span("compute", -1, 3.0, 4.0, "computed"),
        Span("load-0", 2, 0.0, 2.0, "loaded"),
        Span("load-0", 1, 2.0, 4.0, "corrupt"),
    ]
    compute, load, *meaning = printed(Lanes(Report(timeline=spans)), width=50)
    assert compute == "compute |0=========                    t=========|"
    assert load == "load-0  |2===================1!!!!!!!!!!!!!!!!!!!|"
    assert "!: unusable" in " ".join(meaning)
    assert printed(Lanes(Report())) == []


def test_lanes_of_any_timeline_stay_within_the_width() -> None:
    rng = random.Random(0)
    for _ in range(50):
        moments = sorted(rng.random() ** 4 for _ in range(2 * 30))
        spans = [
            Span("compute", index, start, end, "computed")
            for index, (start, end) in enumerate(zip(moments[::2], moments[1::2], strict=True))
        ]
        assert max(map(len, printed(Lanes(Report(timeline=spans)), width=40))) <= 40


def test_bars_share_a_scale() -> None:
    long, short = printed(Bars([Bar("one", 4.0, "green"), Bar("other", 1.0, "blue", "4x")]), width=60)
    assert abs(long.count("█") - 4 * short.count("█")) <= 2
    assert max(len(long), len(short)) <= 60
    assert short.endswith("1.00 s  4x")
