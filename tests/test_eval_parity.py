"""The parity harness, run for real with the package's small model on rows of our own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cake_hf
from cake_hf import LocalStore, MemoryStore
from cake_hf.chunks import codec
from eval import modes, parity, random_model, score, worker
from eval.config import MODES, RunConfig, make_config, read_config
from eval.data.encode import Prompt
from eval.data.rows import Row
from eval.loading import load
from eval.modes import MeetingStore, Runner, checksum_off
from eval.outcomes import Outcome
from eval.runs import RunBusy, RunFolder
from eval.work import Work
from eval.worker import Request, run_in_fresh_process

SMALL = {
    "model": "recall-tiny",
    "tasks": "recall",
    "data": "generated",
    "rows": 2,
    "chars": 1200,
    "chunk_size": 64,
    "threads": 1,
    "min_new_tokens": 3,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(folder: Path, **changed: Any) -> RunConfig:
    return make_config(SMALL, {"store": str(folder / "store"), "out": str(folder / "runs"), **changed})


def run(config: RunConfig, folder: Path, *flags: str) -> int:
    """The command, with the settings in a file."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config.as_dict()))
    return parity.main(["--config", str(folder / "run.yaml"), *flags])


def results(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(config.out) / config.digest / "metrics.json").read_text())
    return found


def stored(config: RunConfig) -> list[str]:
    return list(LocalStore(config.store).keys())


def never(*arguments: object) -> Outcome:
    raise AssertionError("this was run already")


def test_every_mode_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path)
    assert run(config, tmp_path) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["exact"], line["rows"], line["skipped"]) == (True, 2, 0)

    found = results(config)["tasks"]["recall"]["modes"]
    assert list(found) == list(MODES)
    for mode in MODES[2:]:
        assert (
            found[mode]["tokens_as_single"],
            found[mode]["tokens_as_chunked"],
            found[mode]["logits_as_chunked"],
        ) == (1, 1, 1)
        assert (found[mode]["rows"], found[mode]["errors"]) == (2, 0)
    assert found["warm"]["hit_rate"] == 1.0
    assert found["cold"]["hit_rate"] == 0.5  # the second row finds the document that it shares with the first
    assert 0.3 < found["middle"]["loaded"] < 0.7
    assert found["faults"]["loaded"] < 1.0
    assert found["faults"]["failed"] > 0
    assert results(config)["notes"] == {}

    folder = Path(config.out) / config.digest
    assert make_config(read_config(folder / "config.yaml")) == config
    assert json.loads((folder / "environment.json").read_text())["numerics"]["threads"] == 1
    assert "<svg" in (folder / "report.html").read_text()
    assert score.main([str(folder / "predictions" / "warm.jsonl")]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["per_task"] == {"recall": found["warm"]["score"]}
    assert stored(config) == []  # what was put into the store is gone again

    monkeypatch.setattr(Runner, "run", never)
    monkeypatch.setattr(parity, "run_in_fresh_process", never)
    assert run(config, tmp_path) == 0  # all is there already


def test_the_run_with_the_checksum_off_and_a_bit_flipped_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = small(tmp_path, modes="faults", dtype="bfloat16")
    assert run(honest, tmp_path) == 0
    sabotaged = small(tmp_path, modes="faults", dtype="bfloat16", sabotage=True)
    assert run(sabotaged, tmp_path) == 1
    assert "BROKEN" in capsys.readouterr().out
    broken = results(sabotaged)["broken"]
    assert len(broken) == 2
    assert all("than the chunked run's at new token" in complaint for complaint in broken)


def test_a_flipped_bit_with_the_checksum_on_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half of the control: it is the checksum that stands between a flipped bit and a wrong answer."""
    monkeypatch.setattr(modes, "checksum_off", nullcontext)
    config = small(tmp_path, modes="faults", sabotage=True)
    assert run(config, tmp_path) == 0
    assert results(config)["tasks"]["recall"]["modes"]["faults"]["loaded"] == 0.0


def test_the_checksum_is_back_afterwards() -> None:
    with checksum_off():
        assert codec.checksum(b"x") == "anything"
        assert (codec.checksum(b"x") != "anything") is False
    assert codec.checksum(b"x") != codec.checksum(b"y")


def test_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, modes="middle", rows=4)
    real, ran = Runner.run, []

    def stop_at(number: int) -> None:
        def counted(runner: Runner, mode: str, prompt: Prompt) -> Outcome:
            if len(ran) == number:
                raise KeyboardInterrupt
            ran.append((prompt.row, mode))
            return real(runner, mode, prompt)

        monkeypatch.setattr(Runner, "run", counted)

    stop_at(14)  # in the middle of the last part: cold runs are done, some rows are complete
    assert run(config, tmp_path) == 2
    assert "goes on from here" in capsys.readouterr().err
    folder = Path(config.out) / config.digest
    with (folder / "outcomes.jsonl").open("a") as file:
        file.write('{"task": "recall", "row": "rec')  # as if killed while writing
    assert stored(config) != []
    before, ran = ran, []
    stop_at(99)
    assert run(config, tmp_path) == 0
    complete = [row for row, mode in before if mode == "middle"]
    assert len(complete) == 2
    # Rows that were complete are not run again; of the others the oracles are kept, and cold is cold again.
    assert sorted(ran) == sorted((f"recall-{n}", mode) for n in (2, 3) for mode in ("cold", "middle"))
    assert results(config)["tasks"]["recall"]["modes"]["cold"]["hit_rate"] == 0.5
    assert results(config)["rows"] == 4
    assert stored(config) == []


def test_fresh_starts_over_and_so_does_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, modes="chunked", rows=1)
    assert run(config, tmp_path) == 0
    file = Path(config.out) / config.digest / "environment.json"
    salt = json.loads(file.read_text())["salt"]
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", never)
        assert run(config, tmp_path) == 0
        with pytest.raises(AssertionError, match="run already"):
            run(config, tmp_path, "--fresh")
    assert run(config, tmp_path) == 0
    environment = json.loads(file.read_text())
    assert environment["salt"] != salt
    environment["numerics"]["torch"] = "1.0"
    file.write_text(json.dumps(environment))
    monkeypatch.setattr(Runner, "run", never)
    with pytest.raises(AssertionError, match="run already"):
        run(config, tmp_path)
    assert "it starts over" in capsys.readouterr().err


def test_two_processes_do_not_work_on_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(tmp_path, modes="chunked", rows=1)
    with RunFolder(config, {"numerics": {}}):
        with pytest.raises(RunBusy, match="Another process works on this run"):
            RunFolder(config, {"numerics": {}})
        assert run(config, tmp_path) == 2
    assert "Another process" in capsys.readouterr().err
    RunFolder(config, {"numerics": {}}).close()


def test_rows_that_cannot_be_run_are_counted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"_id": "good", "input": "why?", "context": "import os\n" * 60, "answers": ["x"]}
    rows = [
        good,
        {**good, "_id": "long", "context": "import os\n" * 3000},
        {**good, "_id": "broken", "answers": None},
        good,
        {**good, "_id": "fails"},
    ]
    (tmp_path / "trec.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    real = Runner._plain

    def plain(runner: Runner, prompt: Prompt) -> Any:
        if prompt.row == "fails":
            raise MemoryError("simulated")
        return real(runner, prompt)

    monkeypatch.setattr(Runner, "_plain", plain)
    config = small(
        tmp_path, data=str(tmp_path), tasks="trec", rows=None, modes="cold", max_tokens=1000, too_long="skip"
    )
    assert run(config, tmp_path) == 0
    found = results(config)
    assert found["rows"] == 1
    reasons = {
        "trec/record 2": "not a list of texts",
        "trec/record 5": "not JSON",
        "trec/long": "the limit is 1,000",
        "trec/good": "same id",
        "trec/fails": "transformers alone cannot run it: MemoryError",
    }
    assert set(found["skipped"]) == set(reasons)
    for name, words in reasons.items():
        assert words in found["skipped"][name]
    assert "all_classes" in found["unscored"]["trec"]
    assert found["tasks"]["trec"]["modes"]["cold"]["score"] is None
    output = capsys.readouterr().out
    assert "Skipped" in output
    assert "Not scored" in output


def test_an_error_in_a_cached_run_breaks_exactness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(runner: Runner, prompt: Prompt) -> Any:
        raise OSError("raised into generate")

    monkeypatch.setattr(Runner, "_cold", cold)
    config = small(tmp_path, modes="cold", rows=1)
    assert run(config, tmp_path) == 1
    assert results(config)["broken"] == ["recall/recall-0 cold: OSError: raised into generate"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "nowhere"}, "There is no qasper.jsonl"),
        ({"model": "./nowhere"}, "There is no folder"),
        ({"tokenizer": "./nowhere"}, "say --tokenizer"),
        ({"prompts": "nowhere.yaml"}, "The prompts nowhere.yaml cannot be read"),
        ({"store": "memory:"}, "give --store a directory"),
        ({"store": ""}, "Say --store"),
    ],
)
def test_what_cannot_be_run_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], words: str
) -> None:
    assert run(small(tmp_path, tasks="qasper", **changed), tmp_path) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_unknown_settings_and_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--tasks", "quasper"]) == 2
    assert "known are narrativeqa" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "run.yaml").write_text("modle: x")
    assert parity.main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "no setting 'modle'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(make_config(SMALL))


def runner(loaded: tuple[Any, Any], store: cake_hf.Store, **changed: Any) -> Runner:
    return Runner(make_config(SMALL, changed), *loaded, store, salt="test")


def prompt(tokens: int, seed: int = 0, task: str = "recall") -> Prompt:
    ids = torch.randint(10, 1000, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Prompt(task, "r", tuple(ids.tolist()), new_tokens=4)


def test_the_middle_is_forced_only_where_all_chunks_are_stored(loaded: tuple[Any, Any]) -> None:
    store = MemoryStore()
    run = runner(loaded, store).run
    assert run("cold", prompt(6 * 64 + 5)).note == ""
    middle = run("middle", prompt(6 * 64 + 5))
    assert (middle.computed, middle.loaded, middle.note, middle.error) == (3, 3, "", "")
    for key in list(store.keys())[:4]:  # with four to compute it cannot be three and three by chance
        store.delete(key)
    middle = run("middle", prompt(6 * 64 + 5))
    assert (middle.computed + middle.loaded, middle.error) == (6, "")
    assert middle.note == "the two sides did not meet in the middle"
    assert "no middle" in run("middle", prompt(100)).note


def test_the_gate_is_left_open_whatever_happens(loaded: tuple[Any, Any]) -> None:
    gate = MeetingStore(MemoryStore(), chunks=4, meeting=2)
    with pytest.raises(ZeroDivisionError), gate.forcing(loaded[0]):
        raise ZeroDivisionError
    part = memoryview(bytearray(1))
    assert gate.read_into("0" * 40, [part]) is None  # would wait at a gate that is closed
    assert not loaded[0]._forward_pre_hooks


def test_some_tasks_end_with_the_line(loaded: tuple[Any, Any]) -> None:
    tokenizer, run = loaded[1], runner(loaded, MemoryStore(), min_new_tokens=0).run
    newline = tokenizer("\n").input_ids[-1]
    samsum = run("plain", Prompt("samsum", "r", prompt(80).ids, new_tokens=30))
    assert 1 <= len(samsum.tokens) <= 30
    assert newline not in samsum.tokens[:-1]


def test_a_fresh_process_that_dies_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impostor = tmp_path / "python"
    impostor.write_text("#!/bin/sh\ncat > /dev/null\necho first >&2\necho 'no memory left' >&2\nexit 3\n")
    impostor.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(impostor))
    request = Request(make_config(SMALL), "salt", 1, "warm", [prompt(20), prompt(20, task="trec")])
    outcomes = list(run_in_fresh_process(request))
    assert [(outcome.task, outcome.mode) for outcome in outcomes] == [("recall", "warm"), ("trec", "warm")]
    assert {outcome.error for outcome in outcomes} == {"the fresh process ended early: no memory left"}


def test_a_request_reads_back_as_itself() -> None:
    request = Request(make_config(SMALL), "salt", 1, "warm", [prompt(20)])
    assert Request.from_json(request.to_json()) == request


def test_batches_keep_a_documents_rows_together() -> None:
    work = Work()
    for number, document in enumerate("aabbbc"):
        row = Row("recall", str(number), document, "", ())
        work.rows[row.task, row.id] = row
        work.prompts.append(Prompt("recall", row.id, (0,) * 10, 1))
    batches = {tokens: [[one.row for one in batch] for batch in work.batches(tokens)] for tokens in (1, 40, 50, 99)}
    assert batches[1] == [["0", "1"], ["2", "3", "4"], ["5"]]
    assert batches[40] == [["0", "1"], ["2", "3", "4", "5"]]
    assert batches[50] == [["0", "1", "2", "3", "4"], ["5"]]
    assert batches[99] == [["0", "1", "2", "3", "4", "5"]]
    assert list(Work().batches(1)) == []


def test_the_harness_runs_as_a_module() -> None:
    assert sys.modules["eval.parity"].__doc__.startswith("`python -m eval.parity`")


def test_a_random_model_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert random_model.main([str(tmp_path / "llama"), "--layers", "1", "--dtype", "bfloat16"]) == 0
    assert "8 million weights" in capsys.readouterr().out
    config = small(tmp_path, model=str(tmp_path / "llama"), tasks="hotpotqa", rows=1, modes="cold,faults")
    assert run(config, tmp_path) == 0
    assert results(config)["tasks"]["hotpotqa"]["modes"]["faults"]["loaded"] > 0
