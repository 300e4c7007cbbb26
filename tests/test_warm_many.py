"""`cake-hf warm` with several files and folders, and what it says of them; the report of `cake_hf.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import cake_hf
from cake_hf import LocalStore, Report
from commands import flat, run_command, save_model, write_text
from models import CHUNKS, prompt, shared_model

CHUNK = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two documents, one of them below another folder, and what is none or too short."""
    root = tmp_path / "documents"
    (root / "below").mkdir(parents=True)
    (root / ".hidden").mkdir()
    write_text(root / "one.txt", 3 * CHUNK)
    write_text(root / "below" / "two.md", 2 * CHUNK + 5, seed=1)
    write_text(root / ".hidden" / "three.txt", 4 * CHUNK, seed=2)
    write_text(root / "short.txt", CHUNK - 1)
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    (root / "link.txt").symlink_to(root / ".hidden" / "three.txt")
    return root


def warm(model: Path, files: Sequence[Path], store: Path, *more: object):  # type: ignore[no-untyped-def]
    return run_command("warm", model, *files, "--store", store, "--chunk-size", CHUNK, *more)


def chunks(store: Path) -> int:
    return len(list(LocalStore(store).keys())) if store.exists() else 0


def test_all_text_files_of_a_folder_are_warmed(tmp_path: Path, model: Path, folder: Path) -> None:
    result = warm(model, [folder], tmp_path / "kv")
    assert result.exit_code == 0, result.output
    told = flat(result.stdout)
    assert "one.txt 48 48 3 3" in told
    assert "two.md 37 32 2 2" in told
    assert "begins with the stored tokens of one of these" in told
    assert "short.txt: Nothing was warmed" in flat(result.stderr)
    assert "picture.png is not UTF-8 text" in flat(result.stderr)
    assert chunks(tmp_path / "kv") == 5


def test_several_files(tmp_path: Path, model: Path, folder: Path) -> None:
    files = [folder / "one.txt", folder / "below" / "two.md", folder / "one.txt"]
    assert warm(model, files, tmp_path / "kv").exit_code == 0
    assert chunks(tmp_path / "kv") == 5
    again = warm(model, files, tmp_path / "kv")
    assert "one.txt 48 48 3 0" in flat(again.stdout)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["one.txt", "no.txt"], "cannot be read"),
        (["one.txt", "picture.png"], "is not UTF-8 text"),
        (["empty"], "There is no file in the folder"),
        (["short"], "None of 1 file was warmed"),
    ],
)
def test_what_cannot_be_warmed_is_said_at_once(
    tmp_path: Path, model: Path, folder: Path, names: list[str], complaint: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "short").mkdir()
    write_text(folder / "short" / "a.txt", 3)
    write_text(folder / "short" / ".b.txt", 99)
    if names == ["short"]:
        write_text(folder / "short" / "c.txt", 3)
        complaint = "None of 2 files was warmed"
    result = warm(model, [folder / name for name in names], tmp_path / "kv")
    assert result.exit_code == 2, result.output
    assert complaint in flat(result.stderr)
    assert chunks(tmp_path / "kv") == 0


def test_one_file_of_those_named_that_is_too_short_is_an_error(tmp_path: Path, model: Path, folder: Path) -> None:
    result = warm(model, [folder / "one.txt", folder / "short.txt"], tmp_path / "kv")
    assert result.exit_code == 2
    assert "less than one chunk" in flat(result.stderr)


def test_one_document_says_what_will_hit_it(tmp_path: Path, model: Path, folder: Path) -> None:
    told = flat(warm(model, [folder / "below" / "two.md"], tmp_path / "kv").stdout)
    assert "The first 32 of the 37 tokens are stored." in told
    assert "The last 5 tokens of the text, and what follows it, are computed each time." in told
    assert "this number of threads" in told
    assert "chat template" not in told
    portable = flat(warm(model, [folder / "one.txt"], tmp_path / "kv", "--no-exact").stdout)
    assert "number of threads" not in portable
    assert "are computed each time" not in portable


def test_a_chat_model_is_warned_of(tmp_path: Path, model: Path, folder: Path) -> None:
    chat = tmp_path / "chat"
    shared_model("llama").save_pretrained(chat)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(chat)
    told = flat(warm(chat, [folder / "one.txt"], tmp_path / "kv").stdout)
    assert "has a chat template: a prompt from apply_chat_template begins with other tokens" in told


def test_the_model_that_comes_along_has_a_name(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("remember otter = jade\n" * 30)
    options = ("--store", tmp_path / "kv", "--chunk-size", CHUNK)
    assert run_command("warm", "recall-tiny", text, *options).exit_code == 0
    told = ("--prompt", text, "--model", "recall-tiny", "--chunk-size", CHUNK)
    assert run_command("verify", tmp_path / "kv", "--recompute", "10%", *told).exit_code == 0
    assert run_command("export", tmp_path / "kv", tmp_path / "pack", *told).exit_code == 0
    assert run_command("pin", tmp_path / "kv", *told, "--for", "1h").exit_code == 0
    plan = ("--store", tmp_path / "kv", "--tokens", 256, "--measure", "--chunk-size", CHUNK)
    assert run_command("plan", "--model", "recall-tiny", *plan).exit_code == 0
    assert run_command("rm", tmp_path / "kv", "--model", "recall-tiny").exit_code == 0


def test_generate_hands_out_its_report(tmp_path: Path) -> None:
    reports: list[Report] = []
    options = {"store": tmp_path / "kv", "chunk_size": CHUNK, "max_new_tokens": 2, "do_sample": False}
    for _ in range(2):
        cake_hf.generate(shared_model("llama"), prompt(), **options, report=reports.append)
    assert [report.chunks_missed for report in reports] == [CHUNKS, 0]
    assert reports[0].chunks_saved == CHUNKS  # all is durable when it is called


@pytest.mark.parametrize("wrong", [True, "report.json", []])
def test_a_report_that_cannot_be_called(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(TypeError, match=r"^report is called with the prompt's report, as in report=print; .*\.$"):
        cake_hf.generate(shared_model("llama"), prompt(), store=tmp_path / "kv", report=wrong)
    assert not (tmp_path / "kv").exists()
