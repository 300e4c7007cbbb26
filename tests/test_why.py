"""`cake-hf why` and `cake-hf ls`: what a store has of a prompt, and what its chunks were made with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cake_hf import CakeCache
from cake_hf.cli.app import app
from cake_hf.cli.models import load_model
from cake_hf.stores import LocalStore
from commands import flat, run_command, save_model, write_text
from models import prompt

CHUNK = 16
CHUNKS = 5
TOKENS = CHUNK * CHUNKS + 3
COLUMNS = ("namespace", "model", "dtype", "chunks", "tokens", "bytes", "exact", "saved")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "document.txt", TOKENS)


@pytest.fixture
def store(tmp_path: Path, model: Path, text: Path) -> Path:
    folder = tmp_path / "store"
    warm(model, text, folder)
    return folder


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def warm(model: Path, text: Path, store: Path, *more: object) -> None:
    result = run_command("warm", model, text, "--store", store, "--chunk-size", CHUNK, *more)
    assert result.exit_code == 0, result.output


def why(store: object, model: Path, text: Path, *more: object) -> Result:
    more = more if "--chunk-size" in more else (*more, "--chunk-size", CHUNK)
    return run_command("why", store, "--model", model, "--prompt", text, *more)


def test_a_prompt_that_is_found(store: Path, model: Path, text: Path) -> None:
    result = why(store, model, text)
    assert result.exit_code == 0, result.output
    assert f"5 of 5 chunks of this prompt would be found in {store}." in flat(result.output)
    assert "Namespace" not in result.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--threads", 2), "made with 1 thread; this process has 2: call torch.set_num_threads(1), or use exact=False"),
        (("--chunk-size", 32), "made with chunks of 16 tokens; this cache has chunks of 32: pass chunk_size=16."),
        (("--dtype", "bfloat16"), "made with KV in float32; this model's is in bfloat16: load the model with dtype="),
        (("--no-exact",), "made with exact=True; this cache has exact=False: pass exact=True"),
        (("--chunk-size", 512), "less than one chunk of 512 tokens"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_prompt_that_is_there_from_elsewhere(
    store: Path, model: Path, text: Path, options: tuple[object, ...], told: str
) -> None:
    result = why(store, model, text, *options)
    assert result.exit_code == 1, result.output
    assert "has 5 of 5 chunks, saved last on 20" in flat(result.output)
    assert told in flat(result.output)


def test_every_namespace_is_told(store: Path, model: Path, text: Path) -> None:
    warm(model, text, store, "--no-exact")
    warm(model, text, store, "--dtype", "bfloat16")
    said = flat(why(store, model, text).output)
    assert "5 of 5 chunks of this prompt would be found" in said
    assert said.count("Namespace ") == 2


def test_a_prompt_that_nobody_saved(store: Path, model: Path, tmp_path: Path) -> None:
    result = why(store, model, write_text(tmp_path / "other.txt", TOKENS, seed=5))
    assert result.exit_code == 1
    assert "0 of 5 chunks" in flat(result.output)
    assert "Nothing else is known to have been made of it" in flat(result.output)


def test_another_salt_says_nothing_about_the_document(tmp_path: Path, model: Path, text: Path) -> None:
    with_it, without_it = tmp_path / "one", tmp_path / "two"
    warm(model, text, with_it, "--salt", "tenant")
    warm(model, write_text(tmp_path / "other.txt", TOKENS, seed=5), without_it, "--salt", "tenant")
    said = {flat(why(store, model, text).output).replace(str(store), "") for store in (with_it, without_it)}
    assert len(said) == 1
    assert "under another salt" in said.pop()
    assert "5 of 5 chunks" in flat(why(with_it, model, text, "--salt", "tenant").output)


@pytest.mark.parametrize("missing", ["store", "text", "model"])
def test_what_is_not_there_is_one_sentence(store: Path, model: Path, text: Path, tmp_path: Path, missing: str) -> None:
    nothing = tmp_path / "nothing"
    given = {"store": store, "text": text, "model": model, missing: nothing}
    result = why(given["store"], given["model"], given["text"])
    assert result.exit_code == 2
    assert str(nothing) in flat(result.stderr)
    assert "Traceback" not in result.stderr
    assert not nothing.exists()


def test_asking_leaves_no_trace(store: Path, model: Path, text: Path) -> None:
    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in store.rglob("*")}

    before = files()
    why(store, model, text, "--no-exact")
    run_command("ls", store)
    assert files() == before


def listed(store: Path, columns: int) -> list[str]:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["ls", str(store)])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.mark.parametrize("columns", [80, 120])
def test_ls_leaves_no_column_out(store: Path, model: Path, text: Path, tmp_path: Path, columns: int) -> None:
    long = tmp_path / "a-model-with-a-very-long-name-indeed-SmolLM2-135M-Instruct"
    long.symlink_to(model)
    loaded = load_model(str(long))
    loaded.config._name_or_path = long.name
    with CakeCache(loaded, store, chunk_size=CHUNK, salt="x") as cache:
        cache.prefill(prompt(3 * CHUNK))
    lines = listed(store, columns)
    assert all(len(line) <= columns for line in lines)
    headings = next(line for line in lines if line.startswith("namespace "))
    assert [name for name in COLUMNS if name in headings] == list(COLUMNS)
    rows = [line for line in lines if re.match("[0-9a-f]{12} ", line) and re.search(r"\d{4}-\d\d-\d\d", line)]
    assert len(rows) == 2
    assert all(re.search(r"yes +20\d\d-\d\d-\d\d", row) for row in rows)
    cut = "".join(line[12:].strip().split(" ")[0] for line in lines)
    assert long.name in cut.replace("tiny", "")


def test_ls_says_what_is_exact_and_what_is_not_known(store: Path, model: Path, text: Path) -> None:
    warm(model, text, store, "--no-exact")
    assert {"yes", "no"} <= set(" ".join(listed(store, 120)).split())
    for file in (store / "notes").glob("namespace-*"):
        file.write_bytes(b"nonsense")
    lines = listed(store, 120)
    assert sum(line.split()[-2:] == ["?", "?"] for line in lines) == 2


def test_words_are_shown_only_where_they_were_asked_for(store: Path, model: Path, text: Path) -> None:
    assert "first words" not in " ".join(listed(store, 120))
    begin = " ".join(text.read_text().split()[:8])
    assert not any(begin.encode() in file.read_bytes() for file in (store / "notes").iterdir())
    warm(model, text, store, "--keep-words")
    assert begin in " ".join(listed(store, 120))
    longer = write_text(text.parent / "longer.txt", 2 * TOKENS)
    longer.write_text(f"{text.read_text()} {longer.read_text()}")
    warm(model, longer, store)  # of which the other document is the beginning
    assert begin in " ".join(listed(store, 120))


def test_words_cannot_be_kept_of_what_has_a_salt(tmp_path: Path, model: Path, text: Path) -> None:
    result = run_command("warm", model, text, "--store", tmp_path / "salted", "--salt", "s", "--keep-words")
    assert result.exit_code == 2
    assert "under a salt" in flat(result.stderr)
    assert not (tmp_path / "salted").exists()


def test_words_that_would_act_on_a_terminal_do_not(store: Path, model: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.txt"
    odd.write_text("\x1b[31mred " + " ".join(["w9"] * TOKENS))
    warm(model, odd, store, "--keep-words")
    said = "\n".join(listed(store, 120))
    assert "\x1b" not in said
    assert "red w9 w9" in said


def test_a_store_without_records_is_listed_as_ever(store: Path) -> None:
    for file in (store / "notes").iterdir():
        file.unlink()
    (store / "notes").rmdir()
    assert "tiny" in " ".join(listed(store, 80))
    assert len(list(LocalStore(store).keys())) == CHUNKS
