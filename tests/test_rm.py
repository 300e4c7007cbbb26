"""`cake-hf rm`, `pin` and `stats`: what is named, what goes with it, what stays, and what they say to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from cake_hf import CakeCache, LocalStore, MemoryStore
from cake_hf.cli.inspect_store import take_inventory
from cake_hf.cli.selecting import Naming, WarmedOptions, choose
from commands import flat, run_command, save_model, write_text
from families import family_model
from models import prompt as tokens_of
from models import shared_model

CHUNK = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders with models; the weights are the same, the dtype is not when they are used."""
    folder = tmp_path_factory.mktemp("models")
    return save_model(folder / "tiny"), save_model(folder / "other")


class Texts:
    """Three documents: `long` begins with all of `short`; `other` with the same two chunks as these."""

    def __init__(self, folder: Path) -> None:
        words = write_text(folder / "short.txt", 3 * CHUNK).read_text().split()
        more = write_text(folder / "long.txt", 3 * CHUNK, seed=1).read_text().split()
        self.short, self.long, self.other = folder / "short.txt", folder / "long.txt", folder / "other.txt"
        self.long.write_text(" ".join([*words, *more]))
        self.other.write_text(" ".join([*words[: 2 * CHUNK], *more[: 2 * CHUNK]]))


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    return Texts(tmp_path)


@pytest.fixture
def store(tmp_path: Path, models: tuple[Path, Path], texts: Texts) -> Path:
    """Of one model 3 + 3 + 2 chunks, of the other one, in another dtype, 3."""
    folder = tmp_path / "kv"
    for text in (texts.short, texts.long, texts.other):
        warm(models[0], text, folder)
    warm(models[1], texts.short, folder, "--dtype", "bfloat16")
    assert count(folder) == 11
    return folder


def warm(model: Path, text: Path, store: Path, *more: object) -> None:
    result = run_command("warm", model, text, "--store", store, "--chunk-size", CHUNK, *more)
    assert result.exit_code == 0, result.output


def count(store: Path) -> int:
    return len(list(LocalStore(store).keys()))


def of(model: Path, *texts: Path) -> tuple[object, ...]:
    return (*(part for text in texts for part in ("--prompt", text)), "--model", model, "--chunk-size", CHUNK)


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return flat(result.stdout)


def refused(result: Result) -> str:
    """The one sentence."""
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def test_a_document_goes_and_others_keep_what_they_share(store: Path, models: tuple[Path, Path], texts: Texts) -> None:
    told = done(run_command("rm", store, *of(models[0], texts.other)))
    assert "2 chunks stay: other prompts begin with them, too." in told
    assert "2 chunks, " in told
    assert count(store) == 9


def test_rm_deletes_the_chunks_that_continue_a_document(store: Path, models: tuple[Path, Path], texts: Texts) -> None:
    told = done(run_command("rm", store, *of(models[0], texts.short)))
    assert "2 chunks stay" in told
    assert count(store) == 11 - 1 - 3  # its own third chunk, and what `long` adds


def test_the_last_document_takes_what_was_shared(store: Path, models: tuple[Path, Path], texts: Texts) -> None:
    done(run_command("rm", store, *of(models[0], texts.other, texts.long, texts.short)))
    assert count(store) == 3
    again = refused(run_command("rm", store, *of(models[0], texts.short)))
    assert "The store has nothing of" in again


def test_by_model_namespace_and_last_chunk(store: Path, models: tuple[Path, Path]) -> None:
    inventory = take_inventory(LocalStore(store), lambda done, total: None)
    [namespace] = {chunk.metadata.namespace for chunk in inventory.chunks.values() if chunk.table.dtypes == "BF16"}
    leaf = max(inventory.chunks.values(), key=lambda chunk: chunk.metadata.index)
    assert "4 chunks, " in done(run_command("rm", store, "--chunk", leaf.metadata.key[:12]))
    assert count(store) == 7
    done(run_command("rm", store, "--namespace", namespace[:12].upper()))
    assert count(store) == 4
    done(run_command("rm", store, "--model", models[0]))
    assert count(store) == 0
    assert "it is empty" in refused(run_command("rm", store, "--model", "tiny"))


def test_a_dry_run_deletes_nothing(store: Path) -> None:
    assert "8 chunks, " in done(run_command("rm", store, "--model", "tiny", "--dry-run"))
    assert count(store) == 11


def test_any_store_can_lose_a_document() -> None:
    model, memory = shared_model("llama"), MemoryStore()
    for seed in (0, 1):
        with CakeCache(model, memory, chunk_size=CHUNK) as cache:
            cache.prefill(tokens_of(4 * CHUNK, seed), whole=True)
    inventory = take_inventory(memory, lambda done, total: None)
    [leaf, _] = [chunk for chunk in inventory.chunks.values() if chunk.metadata.index == 3]
    keys, shared = choose(memory, inventory, Naming(chunk=leaf.metadata.key), WarmedOptions()).to_delete(inventory)
    assert (len(keys), shared) == (4, 0)


def test_snapshots_go_with_their_chunks(tmp_path: Path) -> None:
    model = family_model("qwen3_next")
    store = LocalStore(tmp_path / "kv")
    with CakeCache(model, store, chunk_size=CHUNK, snapshot_every=1) as cache:
        cache.prefill(tokens_of(4 * CHUNK), whole=True)
    inventory = take_inventory(store, lambda done, total: None)
    assert inventory.states
    name = next(iter(inventory.chunks.values())).metadata.model
    assert "pinned" in done(run_command("pin", store.root, "--model", name, "--for", "1h"))
    assert set(store.pinned()) == {*inventory.chunks, *inventory.states}
    done(run_command("rm", store.root, "--model", name))
    assert list(store.keys()) == []
    assert store.pinned() == {}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "Say what to delete"),
        (("--dry-run",), "Say what to delete"),
        (("--prompt", "short.txt"), "--prompt needs --model"),
        (("--model", "tiny", "--namespace", "ab"), "Name chunks in one way"),
        (("--model", "nobody/nothing"), "has nothing of the model 'nobody/nothing'; it has chunks of other, tiny."),
        (("--namespace", "0x12"), "takes the first hexadecimal digits"),
        (("--namespace", "0123456789abcdef"), "No namespace in the store starts with"),
        (("--chunk", "[red]"), "takes the first hexadecimal digits"),
        (("--chunk", "0123456789abcdef"), "No chunk's key starts with"),
    ],
)
def test_rm_of_nothing_is_one_sentence(store: Path, texts: Texts, arguments: tuple[str, ...], complaint: str) -> None:
    placed = [str(texts.short) if argument == "short.txt" else argument for argument in arguments]
    assert complaint in refused(run_command("rm", store, *placed))
    assert count(store) == 11


def test_a_document_that_is_not_there(tmp_path: Path, store: Path, models: tuple[Path, Path], texts: Texts) -> None:
    short = write_text(tmp_path / "tiny.txt", CHUNK - 1)
    unknown = write_text(tmp_path / "unknown.txt", 4 * CHUNK, seed=9)
    assert "is shorter than a chunk of 16 tokens" in refused(run_command("rm", store, *of(models[0], short)))
    assert "nothing of" in refused(run_command("rm", store, *of(models[0], unknown)))
    assert "nothing of" in refused(run_command("rm", store, *of(models[0], texts.short), "--salt", "x"))
    assert "cannot be read" in refused(run_command("rm", store, *of(models[0], tmp_path / "no.txt")))
    assert "There is no store" in refused(run_command("rm", tmp_path / "nowhere", "--model", "tiny"))
    assert not (tmp_path / "nowhere").exists()


def test_a_document_is_pinned_for_a_time(store: Path, models: tuple[Path, Path], texts: Texts) -> None:
    assert "Nothing is pinned." in done(run_command("pin", store))
    assert "3 chunks pinned" in done(run_command("pin", store, *of(models[0], texts.short), "--for", "2d"))
    shown = done(run_command("pin", store))
    assert "tiny 3" in shown
    assert "3 chunks of it are pinned" in done(run_command("info", store))
    run_command("gc", store, "--budget", "1")
    assert count(store) == 3
    assert "3 pins taken away" in done(run_command("pin", store, "--model", "tiny", "--off"))
    run_command("gc", store, "--budget", "1")
    assert count(store) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "tiny"), "Say for how long"),
        (("--model", "tiny", "--for", "7d", "--off"), "Say for how long"),
        (("--for", "7d"), "Say what to keep"),
        (("--off",), "Say what to keep"),
        (("--model", "tiny", "--for", "soon"), "is not a time"),
        (("--model", "tiny", "--for", "0s"), "is not a time"),
    ],
)
def test_unusable_pin_arguments_are_refused(store: Path, arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in refused(run_command("pin", store, *arguments))
    assert not (store / "pins").exists()


@pytest.mark.parametrize("command", [("pin",), ("stats",)])
def test_only_directories_have_pins_and_notes(command: tuple[str]) -> None:
    assert "directories only" in refused(run_command(*command, "memory:1MB"))


def test_stats_count_prompts_and_hits(tmp_path: Path) -> None:
    store, first, last = LocalStore(tmp_path / "kv"), tokens_of(3 * CHUNK, 0), tokens_of(3 * CHUNK, 1)
    prompts = (first, torch.cat([first, last], 1), torch.cat([first[:, : 2 * CHUNK], last], 1), last)
    for ids in prompts:  # the second one finds 3 chunks, the third one 2
        with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, strategy="load") as cache:
            cache.prefill(ids, whole=True)
    tokens = sum(ids.shape[1] for ids in prompts)
    assert f"4 2 {tokens} 80 {80 / tokens:.0%}" in done(run_command("stats", store.root))
    [day] = json.loads(run_command("stats", store.root, "--json").stdout).values()
    assert (day["prompts"], day["with_hits"], day["tokens_loaded"], day["chunks_loaded"]) == (4, 2, 80, 5)


def test_stats_count_warmed_prompts(store: Path) -> None:
    """Whether a prompt's stored chunks were loaded or computed again is the planner's choice."""
    [day] = json.loads(run_command("stats", store, "--json").stdout).values()
    assert (day["prompts"], day["tokens"]) == (4, 256)
