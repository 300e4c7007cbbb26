"""`cake-hf export`, what `push` says to a folder, and what a card says of prompt and model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cake_hf import CakeCache, MemoryStore, export_pack
from cake_hf.stores.manifest import CARD
from commands import flat, run_command, save_model, write_text
from models import prompt, shared_model
from stored import filled_store

CHUNK = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def warmed(tmp_path: Path, model: Path) -> Path:
    write_text(tmp_path / "report.txt", 4 * CHUNK + 3)
    assert run_command("warm", model, tmp_path / "report.txt", "--store", tmp_path / "kv", *size()).exit_code == 0
    return tmp_path / "kv"


def size() -> tuple[object, ...]:
    return ("--chunk-size", CHUNK)


def told(model: Path, warmed: Path) -> tuple[object, ...]:
    return ("--prompt", warmed.parent / "report.txt", "--model", model, *size())


def test_a_pack_in_a_folder(tmp_path: Path, model: Path, warmed: Path) -> None:
    result = run_command("export", warmed, tmp_path / "pack", *told(model, warmed), "--base-model", "org/tiny")
    assert result.exit_code == 0, result.output
    assert "exported 4 chunks" in flat(result.stdout)
    assert f"CakeCache(model, 'pack:{tmp_path / 'pack'}', chunk_size=16)" in result.stdout
    card = (tmp_path / "pack" / CARD).read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/tiny"
    assert "| prompt | the text file report.txt |" in card
    assert "| base model | [org/tiny](https://huggingface.co/org/tiny) |" in card
    assert 'from_pretrained("org/tiny"' in card
    pulled = run_command("pull", f"pack:{tmp_path / 'pack'}", tmp_path / "pulled")
    assert "wrote 4 chunks" in flat(pulled.stdout)


@pytest.mark.parametrize("repo", ["./pack", "/tmp/pack", "~/pack", "a/b/c", "pack", "pack:out", "here/there"])
def test_push_of_a_folder_names_export(
    tmp_path: Path, model: Path, warmed: Path, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    result = run_command("push", warmed, repo, *told(model, warmed))
    assert result.exit_code == 2
    assert f"cake-hf export {warmed} {repo.removeprefix('pack:')} --prompt FILE --model MODEL." in flat(result.stderr)


@pytest.mark.parametrize("name", ["tiny", "org/tiny/x", "org/ti ny", "https://huggingface.co/org/tiny"])
def test_a_base_model_is_named_as_on_the_hub(tmp_path: Path, model: Path, warmed: Path, name: str) -> None:
    result = run_command("export", warmed, tmp_path / "pack", *told(model, warmed), "--base-model", name)
    assert result.exit_code == 2
    assert "The base model is named as on the Hub, ORG/NAME" in flat(result.stderr)
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ("", "not described by who published it"),
        ("The report of 2025,\nwith its tables", "The report of 2025, with its tables"),
        ("a | b", "a \\| b"),
        ("<script>", "&lt;script>"),
        ("x" * 900, "x" * 500),
    ],
)
def test_the_prompt_stands_in_one_cell(tmp_path: Path, about: str, line: str) -> None:
    model = shared_model("llama")
    export_pack(filled_store(model), tmp_path / "pack", model, prompt(), chunk_size=CHUNK, about=about)
    card = (tmp_path / "pack" / CARD).read_text()
    assert f"| prompt | {line} |" in card
    assert "which has no name on the Hub" in card


def test_a_revision_is_that_of_its_model(tmp_path: Path) -> None:
    model, store = shared_model("llama"), MemoryStore()
    before = model.config._name_or_path
    model.config._name_or_path, model.config._commit_hash = "org/mine", "a" * 40
    try:
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            cache.prefill(prompt())
        options = {"chunk_size": CHUNK, "base_model": "org/other"}
        export_pack(store, tmp_path / "pack", model, prompt(), **options)
    finally:
        model.config._name_or_path, model.config._commit_hash = before, None
    card = (tmp_path / "pack" / CARD).read_text()
    assert 'from_pretrained("org/other", dtype=torch.float32)' in card
    assert "a" * 40 not in card
