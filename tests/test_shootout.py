"""The shoot-out: each outcome with a system that is planted to have it, ours and the recipe on a small model, the page."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.command import bench_app
from benchmarks.shootout import child, command, environments, faults, page, side, slow_disk, speed, trials, variants
from benchmarks.shootout.bench import Bench
from benchmarks.shootout.child import ANSWER, ERROR, HANG, Reply
from benchmarks.shootout.disks import NoDisk
from benchmarks.shootout.documents import make_questions
from benchmarks.shootout.environments import Environment, Environments
from benchmarks.shootout.judge import Outcome, Seen, judge, not_applicable, without_folders
from benchmarks.shootout.questions import DISK, MEMORY, Answer, Options, Question
from benchmarks.shootout.sides import ours, recipe
from benchmarks.shootout.systems import SystemSpec
from cake_hf.cli.models import RECALL_TINY
from waiting import PATIENCE

ROOT = Path(__file__).parent.parent
MODEL = str(RECALL_TINY)
TOKENS = 256
NO_DISK = Environment("", "no FUSE in tests")
PATHS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def planted(*extra: str, tenants: bool = True, adapters: bool = True) -> SystemSpec:
    return SystemSpec(
        "planted", "planted_side", "1", "", extra=extra, variables=PATHS, tenants=tenants, adapters=adapters
    )


def some_questions() -> list[list[Question]]:
    documents = [[*range(start, start + 8)] for start in (0, 100)]
    return [[Question([*ids, tail], 8, "", 5) for tail in range(4)] for ids in documents]


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    def make(spec: SystemSpec) -> Bench:
        questions = [
            [replace(one, text=f"{number}{one.ids}") for one in several]
            for number, several in enumerate(some_questions())
        ]
        work = Path(tempfile.mkdtemp(dir=tmp_path))
        return Bench(spec, Environment(sys.executable), NO_DISK, work, MODEL, questions, 1, PATIENCE)

    return make


# Outcomes


@pytest.mark.parametrize(
    ("extra", "trial", "outcome"),
    [
        ((), "again", Outcome.SAME),
        ((), "restart", Outcome.SAME),
        (("wrong",), "restart", Outcome.WRONG),
        ((), "truncated", Outcome.ERROR),
        (("careful",), "truncated", Outcome.SAME),
        ((), "other-model", Outcome.WRONG),
        (("careful",), "other-model", Outcome.SAME),
        ((), "revision", Outcome.WRONG),
        ((), "dtype", Outcome.WRONG),
        (("careful",), "dtype", Outcome.SAME),
        (("ends",), "restart", Outcome.ERROR),
        (("bad-end",), "again", Outcome.ERROR),
        (("bad-end",), "restart", Outcome.ERROR),
        (("never-up",), "restart", Outcome.NOT_APPLICABLE),
        ((), "hanging", Outcome.NOT_APPLICABLE),
        (("careful",), "writers", Outcome.SAME),
        (("careful",), "killed", Outcome.SAME),
    ],
)
def test_each_outcome_is_found(bench: Any, extra: tuple[str, ...], trial: str, outcome: Outcome) -> None:
    cell = trials.run(bench(planted(*extra)), trial)
    assert (cell.outcome, bool(cell.lines or cell.note)) == (outcome, True), cell


def test_a_system_that_never_answers_hangs(bench: Any) -> None:
    """It never answers, so how long is waited does not matter."""
    under_trial = bench(planted("hangs"))
    expected, store = under_trial.expected(under_trial.first[0]), under_trial.filled()
    under_trial.patience = 0.5
    (reply,) = under_trial.ask(store, under_trial.first)
    assert reply.kind == HANG
    assert judge([Seen("it", reply, expected)]).outcome == Outcome.HANG


def test_a_process_that_has_failed_is_not_asked_again(bench: Any) -> None:
    cell = trials.run(bench(planted("fails-once")), "again")
    assert [line.split(": ", 1)[1] for line in cell.lines] == ["OSError: for once"] * 2


def test_the_last_words_of_a_process_that_ended_are_told(bench: Any) -> None:
    cell = trials.run(bench(planted("ends")), "restart")
    assert "exit code 3" in cell.lines[0]


def test_a_system_that_does_not_come_up_says_why(bench: Any) -> None:
    assert "it does not come up" in trials.run(bench(planted("never-up")), "flipped").note


@pytest.mark.parametrize("trial", ["adapter", "tenants"])
def test_what_a_system_does_not_have_does_not_apply(bench: Any, trial: str) -> None:
    cell = trials.run(bench(planted(tenants=False, adapters=False)), trial)
    assert cell.outcome == Outcome.NOT_APPLICABLE


def test_kv_of_another_tenant_is_told_although_its_tokens_are_the_same(bench: Any) -> None:
    assert trials.run(bench(planted()), "tenants").note == trials.CROSSED
    kept_apart = trials.run(bench(planted("careful")), "tenants")
    assert (kept_apart.outcome, kept_apart.note) == (Outcome.SAME, "")


def test_the_worst_counts_and_wrong_tokens_are_worse_than_an_error() -> None:
    same, wrong = (Seen("one", Reply(ANSWER, Answer(tokens, 0.1, 8)), [1, 2]) for tokens in ([1, 2], [1, 3]))
    error, hang = (Seen("one", Reply(kind, text="words"), [1, 2]) for kind in (ERROR, HANG))
    assert judge([same]).outcome == Outcome.SAME
    assert judge([same, error]).outcome == Outcome.ERROR
    assert judge([error, wrong, same]).outcome == Outcome.WRONG
    assert judge([same, wrong, hang]).outcome == Outcome.HANG
    assert judge([]).outcome == Outcome.NOT_APPLICABLE
    assert judge([same, wrong]).loaded == 16
    assert "the first at token 2 of 2" in wrong.line


def test_fewer_tokens_are_other_tokens() -> None:
    assert Seen("one", Reply(ANSWER, Answer([1], 0.1)), [1, 2]).outcome == Outcome.WRONG


@pytest.mark.parametrize(("starved", "times"), [(True, child.MOST_PATIENCE), (False, 1)])
def test_a_process_that_gets_too_little_of_the_processors_is_given_more_time(
    bench: Any, monkeypatch: pytest.MonkeyPatch, starved: bool, times: int
) -> None:
    under_trial, waits = bench(planted("hangs")), []
    monkeypatch.setattr(child, "starved", lambda used, waited: starved)
    with under_trial.start(under_trial.filled()) as process:
        monkeypatch.setattr(process, "_line", lambda seconds: waits.append(seconds))
        assert process.ask(under_trial.first[0], 0.0).kind == HANG
    assert len(waits) == times


def test_a_process_that_waits_or_is_busy_is_not_starved() -> None:
    assert [child.starved(used, 100.0) for used in (0.0, 1.0, 10.0, 40.0, 60.0, 200.0)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_paths_lose_their_folders() -> None:
    assert without_folders("no file /a/b-1/c.d/x.safetensors here") == "no file .../x.safetensors here"
    assert without_folders("and/or 3/4") == "and/or 3/4"


# Faults


def filled_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, size in (("a", 65_536), ("b", 65_536), ("index", 100)):
        (folder / name).write_bytes(bytes(size))
    return folder


def test_a_flipped_byte_is_one_per_file_with_kv(tmp_path: Path) -> None:
    store = filled_folder(tmp_path / "store")
    assert faults.flip(store) == "one byte in each of 2 files"
    for name in "ab":
        changed = [at for at, byte in enumerate((store / name).read_bytes()) if byte]
        assert [at % 4 for at in changed] == [3]
    assert not any((store / "index").read_bytes())


def test_truncated_and_deleted_files(tmp_path: Path) -> None:
    store = filled_folder(tmp_path / "store")
    faults.truncate(store)
    assert [(store / name).stat().st_size for name in ("a", "b", "index")] == [32_768, 32_768, 100]
    faults.delete(store)
    assert sorted(path.name for path in store.iterdir()) == ["a", "index"]


def test_a_file_with_holes_is_damaged_where_it_has_bytes_and_copied_with_its_holes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with (store / "pool").open("wb") as file:
        file.write(b"\1" * 65_536)
        file.truncate(1 << 26)
    copied = faults.copy(store, tmp_path / "copy")
    assert faults.used(copied) == faults.used(store) < 1 << 20
    faults.flip(copied)
    assert (copied / "pool").read_bytes()[:65_536] != b"\1" * 65_536


def test_other_weights_have_the_same_shape(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    before = load_file(next(RECALL_TINY.glob("*.safetensors")))
    for kind in (variants.REVISION, variants.OTHER):
        folder = Path(variants.other_weights(MODEL, tmp_path / kind, kind))
        after = load_file(next(folder.glob("*.safetensors")))
        assert {name: (one.shape, one.dtype) for name, one in after.items()} == {
            name: (one.shape, one.dtype) for name, one in before.items()
        }
        assert any(not after[name].equal(before[name]) for name in before)


# Ours and the recipe


@pytest.fixture(scope="module")
def questions() -> list[list[Question]]:
    return make_questions(MODEL, "", TOKENS, 4, 2)


def asked(made: Callable[[Options], Any], store: Path, several: Sequence[Question], **options: str) -> list[Any]:
    """Answers as a new process would, in this one."""
    told = {"module": "", "model": MODEL, "dtype": "float32", "store": str(store), "role": DISK} | options
    system, lines = made(Options(**told, threads=1, room=512)), io.StringIO()  # type: ignore[arg-type]
    side.serve(system, [*(json.dumps(one.as_dict()) for one in several), json.dumps(side.CLOSE)], lines)
    *answers, closed = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert closed == {"closed": True}
    return answers


def alone(made: Callable[[Options], Any], several: Sequence[Question], **options: str) -> list[Any]:
    return asked(made, Path("none"), [replace(one, reuse=False) for one in several], **options)


@pytest.mark.parametrize("made", [ours.make, recipe.make])
@pytest.mark.parametrize("role", [DISK, MEMORY])
def test_ours_and_the_recipe_reuse_a_document(made: Any, role: str, questions: Any, tmp_path: Path) -> None:
    several = questions[0][:2]
    expected = [one["tokens"] for one in alone(made, several)]
    found = asked(made, tmp_path, several, role=role)
    assert [one["tokens"] for one in found] == expected
    assert [one["loaded"] for one in found] == [0, TOKENS]
    again = asked(made, tmp_path, several[:1], role=role)
    assert again[0]["loaded"] == (TOKENS if role == DISK else 0)


@pytest.mark.parametrize("damage", [faults.flip, faults.truncate, faults.delete])
def test_ours_computes_what_is_damaged(damage: Any, questions: Any, tmp_path: Path) -> None:
    several = questions[0][:1]
    asked(ours.make, tmp_path, several)
    damage(tmp_path)
    (found,) = asked(ours.make, tmp_path, several)
    assert found["tokens"] == alone(ours.make, several)[0]["tokens"]
    assert found["loaded"] < TOKENS


def test_the_recipe_keeps_kv_of_a_model_with_an_adapter(questions: Any, tmp_path: Path) -> None:
    """An empty cache would look like the right answer without an adapter."""
    pytest.importorskip("peft")
    several = questions[0][:1]
    adapted = variants.adapter(MODEL, tmp_path / "adapter")
    asked(recipe.make, tmp_path / "store", several, adapter=adapted)
    cache = torch.load(next((tmp_path / "store").glob("*.pt")), weights_only=False)
    assert cache.get_seq_length() == TOKENS


def test_the_recipe_takes_what_it_finds(questions: Any, tmp_path: Path) -> None:
    several = questions[0][:1]
    asked(recipe.make, tmp_path / "one", several)
    faults.truncate(tmp_path / "one")
    assert "error" in asked(recipe.make, tmp_path / "one", several)[0]
    asked(recipe.make, tmp_path / "two", several)
    other = variants.other_weights(MODEL, tmp_path / "other", variants.OTHER)
    (found,) = asked(recipe.make, tmp_path / "two", several, model=other)
    assert found["loaded"] == TOKENS, "KV of other weights"


def test_ours_does_not_take_kv_of_other_weights(questions: Any, tmp_path: Path) -> None:
    several = questions[0][:1]
    asked(ours.make, tmp_path / "store", several)
    other = variants.other_weights(MODEL, tmp_path / "other", variants.REVISION)
    (found,) = asked(ours.make, tmp_path / "store", several, model=other)
    assert found["tokens"] == alone(ours.make, several, model=other)[0]["tokens"]
    assert found["loaded"] == 0


# Documents


def test_documents_have_exactly_so_many_tokens_for_every_question(questions: list[list[Question]]) -> None:
    from cake_hf.cli.models import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    assert len(questions) == 2
    for several in questions:
        assert len({one.name for one in several}) == 1
        for one in several:
            assert one.document == TOKENS < len(one.ids)
            assert tokenizer(one.text).input_ids == one.ids
    assert questions[0][0].name != questions[1][0].name


def test_too_few_texts_are_told(tmp_path: Path) -> None:
    (tmp_path / "multifieldqa_en.jsonl").write_text(
        json.dumps({"context": "short", "input": "q", "answers": ["a"], "_id": "1", "length": 1})
    )
    with pytest.raises(ValueError, match="0 texts of 256 tokens"):
        make_questions(MODEL, str(tmp_path), TOKENS, 4, 1)


# Environments and disks


def test_an_environment_that_fails_says_why(tmp_path: Path) -> None:
    spec = replace(planted(), steps=(("nothing",),), probe="raise RuntimeError('no accelerator')")
    found = Environments(tmp_path, {"planted": sys.executable}).find(spec)
    assert not found.python
    assert "no accelerator" in found.reason
    assert "is not there" in Environments(tmp_path, {"planted": "/no/python"}).find(spec).reason
    assert Environments(tmp_path, {}).find(replace(spec, steps=())).python == sys.executable


def test_an_installation_that_takes_too_long_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(environments.subprocess, "run", endless)
    monkeypatch.setattr(environments.venv, "create", lambda *_, **__: None)
    spec = replace(planted(), steps=(("something==1",),))
    found = Environments(tmp_path, {}, 7).find(spec)
    assert (found.python, found.reason) == ("", "Not done after 7 s: -m pip install -q something==1")


def test_a_slow_disk_is_as_slow_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(slow_disk.time, "sleep", slept.append)
    monkeypatch.setattr(slow_disk.time, "monotonic", lambda: 5.0)
    (tmp_path / "pace").write_text("2")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"0123456789" * 100_000)
    seen = slow_disk.Through(str(tmp_path / "source"), slow_disk.Pace(tmp_path / "pace"))
    handle = seen.open("/file", os.O_RDONLY)
    assert seen.read("/file", 10, 5, handle) == b"5678901234"
    seen.read("/file", 1_000_000, 0, handle)
    assert slept == pytest.approx([5e-6, 0.500005], abs=1e-9)
    seen.release("/file", handle)
    assert seen.getattr("/file")["st_size"] == 1_000_000
    assert sorted(seen.readdir("/", 0)) == [".", "..", "file"]


def test_a_disk_that_cannot_be_made_does_not_apply(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Any:
        raise NoDisk("only root may mount")

    monkeypatch.setattr(trials, "full_disk", refused)
    assert trials.run(bench(planted()), "full") == not_applicable("only root may mount")


def test_nothing_but_the_standard_library_is_needed_in_a_foreign_environment() -> None:
    modules = [f"benchmarks.shootout.sides.{file.stem}" for file in (ROOT / "benchmarks/shootout/sides").glob("*.py")]
    names = ", ".join([*modules, *(f"benchmarks.shootout.{name}" for name in ("side", "slow_disk", "variants"))])
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True, timeout=100)


# The command and the page


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the whole command, with a planted system and one that cannot run."""
    systems = {"planted": planted(), "broken": replace(planted(), name="broken", steps=(("nothing",),))}
    for module in (command, page):
        monkeypatch.setattr(module, "SYSTEMS", systems)
    out = tmp_path / "result.json"
    options = ["--model", "recall-tiny", "--tokens", "256", "--rounds", "2", "--threads", "1", "--out", str(out)]
    ready = ["--python", "disk=/no/python", "--python", "broken=/no/python"]
    runner = CliRunner()
    few = [word for name in ("again", "restart", "truncated", "tenants", "hanging") for word in ("--trial", name)]
    assert runner.invoke(bench_app, ["shootout", *options, *ready, *few], catch_exceptions=False).exit_code == 0
    once_more = [*options, *ready, "--only-speed"]
    assert runner.invoke(bench_app, ["shootout", *once_more], catch_exceptions=False).exit_code == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_command_adds_to_one_file_and_the_page_shows_it(result: dict[str, Any], tmp_path: Path) -> None:
    assert {name: cell["outcome"] for name, cell in result["cells"]["planted"].items()} == {
        "again": "same tokens",
        "restart": "same tokens",
        "truncated": "error",
        "tenants": "same tokens",
        "hanging": "not applicable",
    }
    assert list(result["unable"]) == ["broken"]
    measured = result["speed"]["planted"]
    assert (measured["failure"], len(measured["rounds"])) == ("", 2)
    assert measured["no_slow_disk"]
    file = tmp_path / "page.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(result, file)
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for row in (
        "| restart | same |",
        "| truncated files | error |",
        f"| another tenant | same, **{trials.CROSSED}** |",
        "| a disk that hangs | - |",
        "| broken | .../python is not there. |",
        "| planted | 0.01 | 1.00 | 1.00 | 1.00 | - | - | - | 1.00 | 0 |",
    ):
        assert row in text
    assert "`--system planted --trial truncated`" in text
    page.write(result, file)
    assert file.read_text() == text


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("nothing")
    with pytest.raises(ValueError, match="no line"):
        page.write({"cells": {}, "unable": {}}, file)


@pytest.mark.parametrize(
    ("option", "message"), [(["--system", "x"], "no system 'x'"), (["--trial", "x"], "no trial 'x'")]
)
def test_unknown_names_are_refused(option: list[str], message: str) -> None:
    ran = CliRunner().invoke(bench_app, ["shootout", *option])
    assert ran.exit_code
    assert message in str(ran.exception) + ran.output


def test_ratios_are_taken_round_by_round() -> None:
    rounds = [{speed.PLAIN: 2.0, speed.DISK: 1.0, speed.FOUR: 4.0}, {speed.PLAIN: 4.0, speed.DISK: 1.0}]
    assert page._ratio(rounds, speed.DISK) == "0.38"
    assert page._ratio(rounds, speed.FOUR) == "0.50"
    assert page._ratio(rounds, "20") == "-"


def test_the_documentation_shows_the_results_of_the_repository() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "beside" / "shootout.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert page.page(result) in text, "python -m benchmarks shootout --write-page docs/comparison.md"
