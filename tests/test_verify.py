"""Checking a store: what is damaged, and what is well-formed and not true."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cake_hf import CakeCache
from cake_hf.chunks.codec import check_file, parse_header
from cake_hf.cli import recompute as recompute_module
from cake_hf.cli.recompute import Comparing, RecomputeJob, WarmedOptions, recompute_prompt
from cake_hf.cli.verify import verify
from cake_hf.stores import LocalStore, MemoryStore
from cake_hf.testing import FaultStore
from cake_hf.testing.contract import key_of
from cake_hf.testing.forgery import blank, forge, one_bit
from commands import flat, no_progress, run_command, save_model, write_text
from families import family_model, here
from faulty import Faulty, raising
from models import difference, expected, prompt, run, shared_model
from pack_files import write_folder
from stored import filled_store, keys_in_order

CHUNK = 16
CHUNKS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", CHUNK * CHUNKS + 3)


@pytest.fixture
def store(tmp_path: Path, model: Path, text: Path) -> LocalStore:
    """Warmed with the text."""
    warm(model, text, tmp_path / "store")
    return LocalStore(tmp_path / "store")


def warm(model: Path, text: Path, store: Path, *more: object) -> None:
    result = run_command("warm", model, text, "--store", store, "--chunk-size", CHUNK, *more)
    assert result.exit_code == 0, result.output


def rewrite(store: LocalStore, key: str, change: Callable[[bytes], bytes]) -> None:
    raw = bytes(store.read(key) or b"")
    assert change(raw) != raw
    store.write(key, [change(raw)], replace=True)


def recompute(store: LocalStore, model: Path, *more: object, share: str = "100%") -> str:
    """Runs the command; gives its exit code and what it said."""
    options = ("--recompute", share, "--model", model, "--chunk-size", CHUNK, *more)
    result = run_command("verify", store.root, *options)
    assert "Traceback" not in result.output
    return f"{result.exit_code} {flat(result.output + result.stderr)}"


# Damage.


def test_a_store_on_which_a_write_was_torn(tmp_path: Path) -> None:
    """A store that breaks its promise lists half a chunk: the check finds it, and a restore computes and replaces it."""
    chunk_model, inner = shared_model("llama"), LocalStore(tmp_path)
    with CakeCache(chunk_model, inner, chunk_size=CHUNK) as cache:
        cache.prefill(prompt(), whole=True)
    key = keys_in_order(inner)[3]
    raw = bytes(inner.read(key) or b"")
    inner.delete(key)
    torn = FaultStore(inner, {key: "tear"})
    with CakeCache(chunk_model, torn, chunk_size=CHUNK) as cache:
        run(chunk_model, prompt(), cache)
        assert cache.flush(60)
        assert cache.report.chunks_unsaved == 1
    assert [chunk.key for chunk in verify(inner, no_progress).bad] == [key]
    with CakeCache(chunk_model, inner, chunk_size=CHUNK, strategy="load") as cache:
        assert difference(run(chunk_model, prompt(), cache), expected()) == ""
        assert cache.flush(60)
        assert (cache.report.chunks_failed, cache.report.chunks_saved) == (1, 1)
    assert inner.read(key) == raw


def test_a_file_that_says_it_is_huge_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file costs nothing to make; its header has to fit before memory is taken for the rest."""
    store = LocalStore(tmp_path)
    store.write(key_of(1), [struct.pack("<Q", 2), b"{}"])
    store.write(key_of(2), [struct.pack("<Q", 2**40), b"{}"])
    for number in (1, 2):
        os.truncate(tmp_path / key_of(number)[:2] / f"{key_of(number)}.safetensors", 2**36)
    tracemalloc.start()
    try:
        result = verify(store, no_progress)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {chunk.key for chunk in result.bad} == {key_of(1), key_of(2)}
    assert peak < 2 * 2**20


def test_a_chunk_larger_than_the_memory_is_named(store: LocalStore) -> None:
    result = verify(Faulty(store, "read", raising(MemoryError)), no_progress)
    assert len(result.bad) == CHUNKS
    assert not any(chunk.corrupt for chunk in result.bad)


# Lies.


def test_recompute_confirms_an_honest_store(store: LocalStore, model: Path, text: Path) -> None:
    said = recompute(store, model, "--prompt", text)
    assert said.startswith("0 ")
    assert f"The sample is true: {CHUNKS} chunks of {CHUNKS} computed again" in said


@pytest.mark.parametrize("change", [blank, one_bit])
@pytest.mark.parametrize("index", [0, 3, CHUNKS - 1])
def test_recompute_finds_a_well_formed_forgery(
    store: LocalStore, model: Path, text: Path, index: int, change: Callable[[bytearray], None]
) -> None:
    key = keys_in_order(store)[index]
    rewrite(store, key, lambda raw: forge(raw, change))
    check_file(store.read(key) or b"", key)
    assert run_command("verify", store.root).exit_code == 0, "the checksum alone cannot know"
    said = recompute(store, model, "--prompt", text)
    assert said.startswith("1 ")
    assert key in said
    assert f"(number {index}) is well-formed and is not what the model computes" in said
    if change is one_bit:
        assert "1 of 12,288 bytes differ" in said
    assert f"1 damaged of {CHUNKS} chunks" in said
    assert len(keys_in_order(store)) == CHUNKS


def test_a_lie_does_not_make_the_chunks_behind_it_look_wrong_or_right(
    store: LocalStore, model: Path, text: Path
) -> None:
    """Nothing stored goes into the computation: exactly the forged chunks are named."""
    keys = keys_in_order(store)
    for index in (1, 2):
        rewrite(store, keys[index], forge)
    said = recompute(store, model, "--prompt", text)
    assert [key in said for key in keys] == [False, True, True, False, False, False]


def test_fix_deletes_forged_and_damaged_chunks(store: LocalStore, model: Path, text: Path) -> None:
    keys = keys_in_order(store)
    rewrite(store, keys[2], forge)
    rewrite(store, keys[4], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    said = recompute(store, model, "--prompt", text, "--fix")
    assert said.startswith("0 ")
    assert "2 chunks deleted" in said
    assert keys_in_order(store) == [keys[0], keys[1], keys[3], keys[5]]
    warm(model, text, store.root)
    assert recompute(store, model, "--prompt", text).startswith("0 ")


@pytest.mark.parametrize("field", ["index", "parent", "namespace"])
def test_a_header_that_says_the_chunk_stands_elsewhere_is_found(
    store: LocalStore, model: Path, text: Path, field: str
) -> None:
    def move(raw: bytes) -> bytes:
        was = f'"{field}":"{getattr(parse_header(raw)[0], field)}"'.encode()
        becomes = was[:-2] + (b'7"' if was[-2:] != b'7"' else b'8"')
        return raw.replace(was, becomes)

    key = keys_in_order(store)[2]
    rewrite(store, key, move)
    said = recompute(store, model, "--prompt", text)
    assert said.startswith("1 ")
    assert key in said


def test_a_sample_is_chosen_by_its_seed(store: LocalStore) -> None:
    keys = keys_in_order(store)

    def sample(share: float, seed: int) -> set[str]:
        comparing = Comparing(store, share, seed)
        assert comparing.contains(keys) == [False] * CHUNKS
        assert comparing.stored == CHUNKS
        assert comparing.last == max(map(keys.index, comparing.sample)) + 1
        return comparing.sample

    assert sample(0.34, 1) == sample(0.34, 1)
    assert len({frozenset(sample(0.34, seed)) for seed in range(10)}) > 3
    assert [len(sample(share, 0)) for share in (0.01, 0.17, 0.5, 1.0)] == [1, 2, 3, 6]
    store.delete(keys[0])
    missing = Comparing(store, 1.0, 0)
    missing.contains(keys)
    assert missing.sample == set(keys[1:])


def test_a_sample_is_computed_only_as_far_as_it_goes(
    store: LocalStore, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forged chunk lies behind the sampled one, which is the first: it is not looked at."""
    keys = keys_in_order(store)
    computed: list[str] = []

    class Watched(Comparing):
        def contains(self, asked: Sequence[str]) -> list[bool]:
            mask = super().contains(asked)
            self.sample, self.last = {keys[1]}, 2
            return mask

        def write(self, key: str, parts: Sequence[bytes], *, replace: bool = False) -> bool:
            computed.append(key)
            return super().write(key, parts, replace=replace)

    rewrite(store, keys[4], forge)
    monkeypatch.setattr(recompute_module, "Comparing", Watched)
    assert recompute(store, model, "--prompt", text).startswith("0 ")
    assert computed == keys[:2]


def test_several_prompts(tmp_path: Path, store: LocalStore, model: Path, text: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join([*text.read_text().split()[: 2 * CHUNK], *(["w9"] * (2 * CHUNK))]))
    warm(model, other, store.root)
    shared = keys_in_order(store)[0]
    rewrite(store, shared, forge)
    said = recompute(store, model, "--prompt", text, "--prompt", other)
    assert said.startswith("1 ")
    assert f"{CHUNKS + 4} chunks of {CHUNKS + 4} computed again, 1 are not" in said


def test_a_pack_is_recomputed_as_well(tmp_path: Path, model: Path, text: Path, store: LocalStore) -> None:
    """A read-only store can be compared with, too. The pack's digests are of the lie."""
    keys = keys_in_order(store)
    rewrite(store, keys[4], forge)
    content = {key: bytes(store.read(key) or b"") for key in keys}
    folder = write_folder(tmp_path / "pack", content)
    options = ("--recompute", "100%", "--model", model, "--chunk-size", CHUNK, "--prompt", text)
    result = run_command("verify", f"pack:{folder}", *options)
    assert result.exit_code == 1, result.output
    assert f"{CHUNKS} chunks of {CHUNKS} computed again, 1 are not" in flat(result.output)


@pytest.mark.parametrize("family", here("qwen3_next"))
def test_snapshots_of_recurrent_models_are_recomputed_as_well(family: str) -> None:
    """Wherever in the prompt they were kept."""
    chunk_model, store, ids = family_model(family), MemoryStore(), prompt()
    with CakeCache(chunk_model, store, chunk_size=CHUNK, snapshot_every=2) as cache:
        cache.prefill(ids, whole=True)
        assert cache.flush(60)
        chunks, snapshots = cache.report.chunks_saved, cache.report.states_saved
    assert snapshots > 1
    job = RecomputeJob("", [], 1.0, warmed=WarmedOptions(chunk_size=CHUNK))
    result = recompute_prompt(job, store, chunk_model, ids, "a prompt")
    assert (result.sampled, result.stored, result.bad) == (chunks + snapshots, chunks + snapshots, [])
    lie = max(store.keys(), key=lambda key: parse_header(bytes(store.read(key) or b""))[0].key)
    store.write(lie, [forge(bytes(store.read(lie) or b""))], replace=True)
    assert [chunk.key for chunk in recompute_prompt(job, store, chunk_model, ids, "a prompt").bad] == [lie]


@pytest.mark.parametrize("options", [("--salt", "a"), ("--dtype", "bfloat16"), ("--no-exact",)])
def test_the_options_that_the_chunks_were_saved_with(
    store: LocalStore, model: Path, text: Path, options: tuple[str, ...]
) -> None:
    said = recompute(store, model, "--prompt", text, *options)
    assert said.startswith("2 ")
    assert "The store has no chunk of" in said
    warm(model, text, store.root, *options)
    assert recompute(store, model, "--prompt", text, *options).startswith("0 ")


def test_prompts_that_cannot_be_recomputed_are_refused(
    tmp_path: Path, store: LocalStore, model: Path, text: Path
) -> None:
    short = write_text(tmp_path / "short.txt", CHUNK - 1)
    assert "less than one chunk" in recompute(store, model, "--prompt", short)
    assert "cannot be read" in recompute(store, model, "--prompt", tmp_path / "missing.txt")
    assert "like 5%" in recompute(store, model, "--prompt", text, share="5")
    for options in (("--recompute", "5%"), ("--recompute", "5%", "--model", model), ("--model", model)):
        result = run_command("verify", store.root, *options)
        assert result.exit_code == 2
        assert "--prompt" in flat(result.stderr)


def test_a_sampled_chunk_that_cannot_be_read_is_named_and_stays(
    store: LocalStore, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys_in_order(store)[1]
    rewrite(store, key, lambda raw: raw[:-1])
    said = recompute(store, model, "--prompt", text)
    assert said.startswith("1 ")
    assert f"1 damaged of {CHUNKS} chunks" in said


def test_the_help_says_why_a_prompt_is_needed() -> None:
    said = flat(run_command("verify", "--help").output)
    assert "does not have the texts of its prompts" in said or "not have the texts" in said


# Forgery itself.


def test_a_forged_chunk_passes_every_check(store: LocalStore) -> None:
    key = keys_in_order(store)[0]
    raw = bytes(store.read(key) or b"")
    forged = forge(raw)
    assert len(forged) == len(raw)
    assert check_file(forged, key).index == 0
    assert json.dumps(parse_header(forged)[1]) == json.dumps(parse_header(raw)[1])


def test_a_forged_chunk_changes_the_answer() -> None:
    """What the checks do not promise: KV that somebody made up is used, and changes what the model says."""
    chunk_model = shared_model("llama")
    inner = filled_store(chunk_model)
    lying = FaultStore(inner, dict.fromkeys(inner.keys(), "lie"))
    with CakeCache(chunk_model, lying, chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(chunk_model, prompt(), cache)
        assert cache.report.chunks_failed == 0
    assert difference(outcome, expected()) != ""
