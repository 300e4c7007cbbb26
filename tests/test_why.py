"""`cake-hf why` and `cake-hf ls`: what a store has of a prompt, and what its chunks were made with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cake_hf import CakeCache
from cake_hf.chunks.codec import parse_header
from cake_hf.cli.app import app
from cake_hf.cli.models import load_model
from cake_hf.keys import state_key
from cake_hf.stores import LocalStore
from commands import flat, run_command, save_model, write_text
from families import family_model, here
from models import prompt
from stored import keys_in_order

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


def test_a_prompt_that_was_not_saved(store: Path, model: Path, tmp_path: Path) -> None:
    result = why(store, model, write_text(tmp_path / "other.txt", TOKENS, seed=5))
    assert result.exit_code == 1
    assert "0 of 5 chunks" in flat(result.output)
    assert "No other chunks of it are known" in flat(result.output)


def test_another_salt_says_nothing_about_the_document(tmp_path: Path, model: Path, text: Path) -> None:
    with_it, without_it = tmp_path / "one", tmp_path / "two"
    warm(model, text, with_it, "--salt", "tenant")
    warm(model, write_text(tmp_path / "other.txt", TOKENS, seed=5), without_it, "--salt", "tenant")
    said = {flat(why(store, model, text).output).replace(str(store), "") for store in (with_it, without_it)}
    assert len(said) == 1
    assert "under another salt" in said.pop()
    assert "5 of 5 chunks" in flat(why(with_it, model, text, "--salt", "tenant").output)


@pytest.mark.parametrize("missing", ["store", "text", "model"])
def test_a_missing_store_model_or_file_is_one_sentence(
    store: Path, model: Path, text: Path, tmp_path: Path, missing: str
) -> None:
    nothing = tmp_path / "nothing"
    given = {"store": store, "text": text, "model": model, missing: nothing}
    result = why(given["store"], given["model"], given["text"])
    assert result.exit_code == 2
    assert str(nothing) in flat(result.stderr)
    assert "Traceback" not in result.stderr
    assert not nothing.exists()


def test_why_and_ls_change_no_file(store: Path, model: Path, text: Path) -> None:
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


# Where prompts part.


def with_start(text: Path, tokens: int, more: int, seed: int = 7) -> Path:
    """A text that begins with so many of these tokens, and goes on otherwise."""
    words = text.read_text().split()[:tokens]
    other = write_text(text.parent / f"other{tokens}.txt", more, seed=seed)
    other.write_text(" ".join([*words, *other.read_text().split()]))
    return other


@pytest.mark.fault(
    "Prompt",
    "A prompt begins as a stored one does and then differs, by its text, its tokenizer or its chat template.",
    "`cake-hf why` says how many tokens agree, and within how many more the two part.",
)
@pytest.mark.parametrize(
    ("tokens", "found", "told"),
    [
        (2 * CHUNK, 2, "The first 32 tokens agree with what is stored; within the next 16 they differ"),
        (3 * CHUNK + 9, 3, "The first 48 tokens agree with what is stored; within the next 16 they differ"),
        (0, 0, "differs within the first 16 tokens"),
        (TOKENS, 5, "Nothing behind the first 80 tokens is stored."),
    ],
)
def test_why_says_where_a_prompt_starts_to_differ(
    store: Path, model: Path, text: Path, tokens: int, found: int, told: str
) -> None:
    result = why(store, model, with_start(text, tokens, 3 * CHUNK))
    assert result.exit_code == (0 if found else 1), result.output
    assert f"{found} of " in flat(result.output)
    assert told in flat(result.output)


@pytest.mark.parametrize("warmed", [("--prompt",), ("--prompt", "--boundary", 20), ("--prompt", "--boundary", 5)])
def test_a_document_that_is_not_declared_is_named(
    tmp_path: Path, model: Path, text: Path, warmed: tuple[object, ...]
) -> None:
    """The question's prompt has the document's tokens, and does not say where that ends, or where it was cut."""
    warm(model, text, tmp_path / "kv", *warmed)
    asked = with_start(text, TOKENS, 20)
    said = flat(why(tmp_path / "kv", model, asked).output)
    inner = f", boundaries=[{warmed[2]}]" if len(warmed) > 1 else ""
    assert f"The first {TOKENS} tokens are stored as a document: declare its end" in said
    assert f"cache.prefill(ids[:, :{TOKENS}]{inner})" in said
    declared = why(tmp_path / "kv", model, asked, *warmed[1:], "--boundary", TOKENS)
    assert declared.exit_code == 0
    assert "declare" not in declared.output


def test_the_end_of_a_document_is_named(tmp_path: Path, model: Path, text: Path) -> None:
    warm(model, text, tmp_path / "kv", "--prompt")
    assert "5 of 5 chunks of this prompt, and the last 3 tokens, would be found" in flat(
        why(tmp_path / "kv", model, text).output
    )
    short = write_text(tmp_path / "short.txt", 7)
    assert why(tmp_path / "kv", model, short).exit_code == 1
    warm(model, short, tmp_path / "kv", "--prompt")
    result = why(tmp_path / "kv", model, short)
    assert (result.exit_code, "The last 7 tokens would be found" in flat(result.output)) == (0, True)


def test_a_short_document_is_there_from_elsewhere(tmp_path: Path, model: Path) -> None:
    short = write_text(tmp_path / "short.txt", 7)
    warm(model, short, tmp_path / "kv", "--prompt")
    said = flat(why(tmp_path / "kv", model, short, "--threads", 2, "--boundary", 7).output)
    assert "made with 1 thread; this process has 2" in said


@pytest.mark.parametrize("gone", [(0,), (0, 1, 3), (2,)])
def test_chunks_that_are_gone_are_counted(store: Path, model: Path, text: Path, gone: tuple[int, ...]) -> None:
    opened = LocalStore(store)
    keys = keys_in_order(opened)
    for number in gone:
        opened.delete(keys[number])
    said = flat(why(store, model, text).output)
    assert f"{5 - len(gone)} of 5 chunks" in said
    assert f"{len(gone)} chunk{'s' * (len(gone) > 1)} before these are gone" in said


def changed_weights(folder: Path) -> None:
    loaded = load_model(str(folder))
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    loaded.save_pretrained(folder)


def changed_config(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "rms_norm_eps": 1e-4}))


def changed_tokenizer(folder: Path) -> None:
    """One that puts a token for the begin in front."""
    told = json.loads((folder / "tokenizer.json").read_text())
    told["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(told))


def another_word(folder: Path) -> None:
    """One that gives the 40th word of the text another number: as of another revision."""
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"].update(w40=told["model"]["vocab"]["w41"], w41=told["model"]["vocab"]["w40"])
    (folder / "tokenizer.json").write_text(json.dumps(told))


@pytest.mark.fault(
    "Model",
    "The model, or its tokenizer, has changed since a prompt was saved.",
    "`cake-hf why` names what differs: the weights, an entry of the config, or how far the tokens agree; and what to do.",
)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            changed_weights,
            "made with other weights of tiny: load the same revision, with the same adapters and changes.",
        ),
        (changed_config, "rms_norm_eps 1e-06; this model has 0.0001: load it with the same config"),
        (changed_tokenizer, "differs within the first 16 tokens: compare"),
        (
            another_word,
            "tokens agree with what is stored; within the next 16 they differ: compare the texts, the tokenizers",
        ),
    ],
)
def test_a_model_that_has_changed_is_told(tmp_path: Path, change: Callable[[Path], None], told: str) -> None:
    folder, text = save_model(tmp_path / "tiny"), tmp_path / "text.txt"
    words = [f"w{3 + number % 30}" for number in range(TOKENS)]
    words[40] = "w40"
    text.write_text(" ".join(words))
    warm(folder, text, tmp_path / "kv")
    change(folder)
    said = flat(why(tmp_path / "kv", folder, text).output)
    assert told in said


@pytest.mark.parametrize("family", here("lfm2"))
@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_model_without_snapshots_is_told(tmp_path: Path, family: str) -> None:
    folder, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt", TOKENS)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    family_model(family).save_pretrained(folder)
    warm(folder, text, tmp_path / "kv")
    opened = LocalStore(tmp_path / "kv")
    assert "snapshot" not in why(tmp_path / "kv", folder, text).output
    longer = with_start(text, 5 * CHUNK, 4)
    [state] = [key for key in opened.keys() if key == state_key(parse_header(opened.read(key) or b"")[0].parent)]  # noqa: SIM118
    shorter = tmp_path / "shorter.txt"
    shorter.write_text(" ".join(text.read_text().split()[: 3 * CHUNK + 1]))
    said = flat(why(tmp_path / "kv", folder, shorter).output)
    assert "3 of 3 chunks" in said
    assert "But no snapshot of the model's recurrent state is stored, without which all is computed" in said
    assert "snapshot" not in why(tmp_path / "kv", folder, longer).output
    opened.delete(state)
    assert "But no snapshot" in flat(why(tmp_path / "kv", folder, longer).output)
