"""Packs in folders: what comes out of a store goes into another, bit for bit, and nothing else does."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import family_runs
from cake_hf import CakeCache, CorruptChunk, LocalStore, MemoryStore, Store, StoreError, export_pack, import_pack
from cake_hf.chunks.codec import parse_header
from cake_hf.cli.inspect_store import take_inventory
from cake_hf.cli.recompute import RecomputeJob, WarmedOptions, recompute_prompt
from cake_hf.cli.verify import verify
from cake_hf.keys import state_key
from cake_hf.stores.manifest import (
    CARD,
    MANIFEST,
    PackManifest,
    chunk_path,
    parse_manifest,
)
from cake_hf.stores.mismatch import why_not
from cake_hf.stores.pack import PackStore, open_folder_pack
from cake_hf.testing import GateStore, ReadOnlyContract, WrapperStore, read_only
from cake_hf.testing.contract import read_whole
from cake_hf.testing.forgery import forge
from cake_hf.util.processor import processor
from families import family_model, here
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run, shared_model
from pack_files import write_folder
from stored import filled_store


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return shared_model("llama")


@pytest.fixture(scope="module")
def store(model: torch.nn.Module) -> MemoryStore:
    """A store with all chunks of the prompt."""
    return filled_store(model)


@pytest.fixture
def pack(tmp_path: Path, model: torch.nn.Module, store: MemoryStore) -> Path:
    """Those chunks as a pack."""
    export_pack(store, tmp_path / "pack", model, prompt(), chunk_size=CHUNK)
    return tmp_path / "pack"


class TestFolderPack(ReadOnlyContract):
    def make_filled(self, tmp_path: Path, content: Mapping[str, bytes]) -> Store:
        return open_folder_pack(write_folder(tmp_path, content))


class TestWrappedPack(ReadOnlyContract):
    """Wrappers hand on that nothing can be written."""

    def make_filled(self, tmp_path: Path, content: Mapping[str, bytes]) -> Store:
        return WrapperStore(open_folder_pack(write_folder(tmp_path, content)))


@pytest.mark.parametrize("sin", ["none", "can be written", "says that it can be written", "brings other bytes"])
def test_the_contract_for_reading_finds_a_careless_store(sin: str) -> None:
    class Careless(MemoryStore):
        read_only = sin != "says that it can be written"
        full = False

        def write(self, key: str, parts: Any, *, replace: bool = False) -> bool:
            self.refuse()
            return super().write(key, parts, replace=replace)

        def delete(self, key: str) -> bool:
            self.refuse()
            return super().delete(key)

        def check_writable(self) -> None:
            self.refuse()

        def refuse(self) -> None:
            if self.full and sin != "can be written":
                raise StoreError("full")

        def read_range(self, key: str, parts: Any, offset: int) -> bool:
            return super().read_range(key, parts, offset + 1 if sin == "brings other bytes" else offset)

    store = Careless()
    for key, value in read_only.CONTENT.items():
        store.write(key, [value])
    store.full = True

    def check() -> None:
        contract = ReadOnlyContract()
        contract.test_a_value_comes_back(store, 1)
        contract.test_a_range_comes_back(store, 1, 1, [5])
        contract.test_nothing_can_be_written(store)

    if sin == "none":
        check()
    else:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check()


# A pack serves the model.


@pytest.mark.parametrize("strategy", ["both", "load"])
def test_a_pack_restores_bit_for_bit(pack: Path, model: torch.nn.Module, strategy: str) -> None:
    with CakeCache(model, open_folder_pack(pack), chunk_size=CHUNK, strategy=strategy) as cache:
        outcome = run(model, prompt(), cache)
        assert cache.report.chunks_loaded + cache.report.chunks_computed == CHUNKS
        if strategy == "load":
            assert cache.report.chunks_loaded == CHUNKS
    assert difference(outcome, oracle(model, prompt())) == ""


def test_a_cache_on_a_pack_saves_nothing_and_does_not_mind(pack: Path, model: torch.nn.Module) -> None:
    before = sorted(path.relative_to(pack) for path in pack.rglob("*"))
    with CakeCache(model, open_folder_pack(pack), chunk_size=CHUNK) as cache:
        run(model, prompt(seed=9), cache)
        assert cache.flush(60)
        assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (0, 0)
        assert cache.report.reason_code == "none-stored"
    assert sorted(path.relative_to(pack) for path in pack.rglob("*")) == before


def test_a_pack_is_a_local_store_too(pack: Path, store: MemoryStore) -> None:
    local = LocalStore(pack)
    assert sorted(local.keys()) == sorted(store.keys())
    assert all(read_whole(local, key) == read_whole(store, key) for key in store.keys())  # noqa: SIM118 (a store is no dict)


@pytest.mark.parametrize("where", [0, 5000, -1])
def test_a_damaged_file_is_computed(pack: Path, model: torch.nn.Module, where: int) -> None:
    key = open_folder_pack(pack).manifest.chunks[5].key
    flip(pack / chunk_path(key), where)
    opened = open_folder_pack(pack)
    with pytest.raises(CorruptChunk):
        opened.read(key)
    with pytest.raises(CorruptChunk):
        opened.read_range(key, [memoryview(bytearray(10))], where if where >= 0 else 0)
    with CakeCache(model, opened, chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS - 1, 1)
    assert difference(outcome, oracle(model, prompt())) == ""


def test_a_well_formed_lie_is_found_by_its_digest_alone(pack: Path, model: torch.nn.Module) -> None:
    """KV that no model made, in this model's name with checksums of its own: a plain store serves it, a pack does not."""
    chunk = pack / chunk_path(open_folder_pack(pack).manifest.chunks[5].key)
    chunk.write_bytes(forge(chunk.read_bytes()))
    with CakeCache(model, LocalStore(pack), chunk_size=CHUNK, strategy="load", save=False) as cache:
        fooled = run(model, prompt(), cache)
        assert cache.report.chunks_loaded == CHUNKS
    assert difference(fooled, oracle(model, prompt())) != ""
    with CakeCache(model, open_folder_pack(pack), chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS - 1, 1)
    assert difference(outcome, oracle(model, prompt())) == ""


@pytest.mark.parametrize("damage", ["gone", "cut short", "grown", "a pipe", "a folder"])
def test_a_file_that_is_not_what_is_listed_is_computed(pack: Path, model: torch.nn.Module, damage: str) -> None:
    path = pack / chunk_path(open_folder_pack(pack).manifest.chunks[5].key)
    raw = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(raw[:-1])
    elif damage == "grown":
        path.write_bytes(b"x" + raw)
    elif damage == "a pipe":
        os.mkfifo(path)
    elif damage == "a folder":
        path.mkdir()
    with CakeCache(model, open_folder_pack(pack), chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS - 1, 1)
    assert difference(outcome, oracle(model, prompt())) == ""


# Why a pack does not serve.


def test_the_report_says_what_is_different(
    tmp_path: Path, pack: Path, model: torch.nn.Module, store: MemoryStore
) -> None:
    def reason(model: torch.nn.Module, opened: PackStore, **options: Any) -> str:
        with CakeCache(model, GateStore(opened), **{"chunk_size": CHUNK, **options}) as cache:
            run(model, prompt(), cache)
            return cache.report.reason

    opened = open_folder_pack(pack)
    assert f"the pack {pack} was made with another model (class: " in reason(shared_model("qwen2"), opened)
    assert "holds KV of dtype F32, this model's is BF16; load the model in that dtype" in reason(
        shared_model("llama", "bfloat16"), opened
    )
    assert reason(model, opened, chunk_size=32).endswith("has chunks of 16 tokens; pass chunk_size=16")
    assert reason(model, opened, exact=False).endswith("was made with exact=True; pass exact=True")
    assert reason(model, opened, salt="s").endswith("was made without a salt; pass none")
    assert "other weights" in reason(build("llama", seed=5), opened)
    assert 'other numerics (attention: "sdpa" there, "eager" here)' in reason(
        shared_model("llama", attention="eager"), opened
    )
    secret = MemoryStore()
    with CakeCache(model, secret, chunk_size=CHUNK, salt="s") as cache:
        cache.prefill(prompt())
    export_pack(secret, tmp_path / "salted", model, prompt(), chunk_size=CHUNK, salt="s", allow_salted=True)
    assert reason(model, open_folder_pack(tmp_path / "salted")).endswith("was made with another salt; pass its salt")
    with CakeCache(model, open_folder_pack(tmp_path / "salted"), chunk_size=CHUNK, salt="s") as cache:
        run(model, prompt(), cache)
        assert cache.report.reason == ""


def test_another_processor_is_told_by_what_it_has() -> None:
    theirs = {"numerics": {"processor": {"cpu model": "143", "instructions": {"amx_tile": True, "avx": True}}}}
    ours = {"numerics": {"processor": {"cpu model": "106", "instructions": {"avx": True}}}}
    assert '(cpu model: "143" there, "106" here; amx_tile: true there, null here)' in why_not(theirs, False, ours)


def test_what_a_stranger_wrote_does_not_reach_the_terminal() -> None:
    evil = "\x1b[2J\u202e" + "x" * 500
    theirs = {"format": "1", "chunk_size": 16, "model": {evil: evil}, "layout": {"a": {"dtype": evil}}}
    for there, ours in [(theirs, {**theirs, "model": {}}), (theirs, {**theirs, "layout": {"a": {"dtype": "F32"}}})]:
        text = why_not(there, False, ours)
        assert text.isprintable()
        assert text.isascii()
        assert len(text) < 400


# Out of a store.


def test_the_manifest_says_what_is_in_the_pack(pack: Path, model: torch.nn.Module, store: MemoryStore) -> None:
    manifest = open_folder_pack(pack).manifest
    assert manifest.tokens == (0, CHUNK * CHUNKS)
    assert [chunk.index for chunk in manifest.chunks] == list(range(CHUNKS))
    assert (manifest.dtype, manifest.chunk_size, manifest.salted) == ("F32", CHUNK, False)
    assert manifest.model == "LlamaForCausalLM"
    assert manifest.facts["numerics"]["torch"] == torch.__version__
    assert manifest.nbytes == sum(path.stat().st_size for path in pack.rglob("*.safetensors"))
    assert parse_manifest(manifest.to_json()) == manifest
    assert {path.name for path in pack.iterdir() if path.is_file()} == {MANIFEST, CARD}


def test_the_card_has_metadata_and_code_that_can_be_pasted(pack: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    card = (pack / CARD).read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {"library_name": "cake_hf", "tags": ["cake_hf", "kv-cache"]}
    processors = [f"{name} {value}" for name, value in processor().items() if name != "instructions"]
    assert all(told in card for told in processors)
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert f'CakeCache(model, "pack:pack", chunk_size={CHUNK})' in snippet
    named = build("llama")
    named.config._name_or_path, named.config._commit_hash = "org/tiny", "a" * 40
    portable = MemoryStore()
    with CakeCache(named, portable, chunk_size=CHUNK, exact=False) as cache:
        cache.prefill(prompt())
    manifest = export_pack(portable, tmp_path / "named", named, prompt(), chunk_size=CHUNK, exact=False)
    assert (manifest.model, manifest.model_revision) == ("org/tiny", "a" * 40)
    card = (tmp_path / "named" / CARD).read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/tiny"
    assert f'from_pretrained("org/tiny", revision="{"a" * 40}", dtype=torch.float32)' in card
    assert "exact=False)" in card


def test_a_salt_is_not_given_away(tmp_path: Path, model: torch.nn.Module) -> None:
    salt = "a-secret-that-is-easy-to-find"
    salted = MemoryStore()
    with CakeCache(model, salted, chunk_size=CHUNK, salt=salt) as cache:
        cache.prefill(prompt())
    with pytest.raises(StoreError, match="--allow-salted"):
        export_pack(salted, tmp_path / "pack", model, prompt(), chunk_size=CHUNK, salt=salt)
    assert not (tmp_path / "pack").exists()
    with pytest.raises(StoreError, match="none of this prompt's chunks"):  # without the salt nothing is found
        export_pack(salted, tmp_path / "pack", model, prompt(), chunk_size=CHUNK)
    manifest = export_pack(salted, tmp_path / "pack", model, prompt(), chunk_size=CHUNK, salt=salt, allow_salted=True)
    assert manifest.salted
    files = [path for path in (tmp_path / "pack").rglob("*") if path.is_file()]
    assert len(files) == CHUNKS + 3  # the tail, the manifest and the card
    assert not any(salt.encode() in path.read_bytes() for path in files)


def test_chunks_missing_from_the_store_are_left_out_of_the_pack(
    tmp_path: Path, model: torch.nn.Module, store: MemoryStore
) -> None:
    holes = without(store, {0, 3})
    manifest = export_pack(holes, tmp_path / "pack", model, prompt(), chunk_size=CHUNK)
    assert [chunk.index for chunk in manifest.chunks] == [1, 2, 4, 5, 6, 7]
    assert manifest.tokens == (CHUNK, CHUNK * CHUNKS)
    with CakeCache(model, open_folder_pack(tmp_path / "pack"), chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_missed) == (6, 2)
    assert difference(outcome, oracle(model, prompt())) == ""


def test_a_damaged_chunk_is_not_published(tmp_path: Path, model: torch.nn.Module, store: MemoryStore) -> None:
    damaged = without(store, set())
    key = max(damaged.keys(), key=lambda key: index_of(damaged, key))
    raw = damaged.read(key)
    assert raw is not None
    raw[-1] ^= 1
    damaged.write(key, [raw], replace=True)
    with pytest.raises(CorruptChunk, match="does not match its checksum"):
        export_pack(damaged, tmp_path / "pack", model, prompt(), chunk_size=CHUNK)
    with pytest.raises(StoreError, match="no pack"):  # half of a pack is none
        open_folder_pack(tmp_path / "pack")


def test_where_a_pack_is_written_to(tmp_path: Path, model: torch.nn.Module, store: MemoryStore) -> None:
    def export(folder: Path, source: Store = store) -> PackManifest:
        return export_pack(source, folder, model, prompt(), chunk_size=CHUNK)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear reader")
    with pytest.raises(StoreError, match="something else than a pack"):
        export(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letter.txt"]
    with pytest.raises(StoreError, match="cannot be written"):
        export(tmp_path / "other" / "letter.txt")
    export(tmp_path / "pack")
    export(tmp_path / "pack", without(store, {7}))  # an older pack is replaced, and nothing of it is left
    assert len(list((tmp_path / "pack").rglob("*.safetensors"))) == CHUNKS - 1
    assert len(open_folder_pack(tmp_path / "pack").manifest.chunks) == CHUNKS - 1


def test_ids_that_are_not_one_prompt_are_refused(tmp_path: Path, model: torch.nn.Module, store: MemoryStore) -> None:
    for ids in (prompt()[0], prompt().repeat(2, 1), prompt(CHUNK - 1)):
        with pytest.raises(ValueError, match="at least one chunk"):
            export_pack(store, tmp_path / "pack", model, ids, chunk_size=CHUNK)
    assert not (tmp_path / "pack").exists()


# Into a store.


def test_a_pack_comes_into_a_store(tmp_path: Path, pack: Path, model: torch.nn.Module, store: MemoryStore) -> None:
    seen: list[tuple[int, int]] = []
    imported = import_pack(pack, tmp_path / "store", model=model, progress=lambda *at: seen.append(at))
    assert (imported.chunks, imported.nbytes) == (CHUNKS, imported.manifest.nbytes)
    assert seen == [(done, CHUNKS) for done in range(CHUNKS + 1)]
    local = LocalStore(tmp_path / "store")
    assert {key: read_whole(local, key) for key in local.keys()} == {  # noqa: SIM118
        key: read_whole(store, key)
        for key in store.keys()  # noqa: SIM118
    }
    assert import_pack(f"pack:{pack}", local).chunks == 0  # all there


def test_what_is_there_is_not_read_again(pack: Path, store: MemoryStore) -> None:
    target = without(store, {2})
    for chunk in open_folder_pack(pack).manifest.chunks:
        if chunk.index != 2:
            (pack / chunk_path(chunk.key)).unlink()
    assert import_pack(pack, target).chunks == 1


def test_another_models_pack_is_refused(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"The pack .* was made with another model \(class: .*\)\.$"):
        import_pack(pack, tmp_path / "store", model=shared_model("qwen2"))
    with pytest.raises(StoreError, match="dtype F32, this model's is BF16"):
        import_pack(pack, tmp_path / "store", model=shared_model("llama", "bfloat16"))
    with pytest.raises(StoreError, match="pass none"):
        import_pack(pack, tmp_path / "store", model=shared_model("llama"), salt="s")
    assert not (tmp_path / "store").exists()


def test_a_damaged_pack_is_not_imported(pack: Path, tmp_path: Path) -> None:
    keys = [chunk.key for chunk in open_folder_pack(pack).manifest.chunks]
    flip(pack / chunk_path(keys[5]), 5000)
    with pytest.raises(CorruptChunk, match=keys[5]):
        import_pack(pack, tmp_path / "store")
    assert keys[5] not in set(LocalStore(tmp_path / "store").keys())


def test_chunks_of_another_namespace_are_not_imported(tmp_path: Path, store: MemoryStore) -> None:
    """The digests are right, but the manifest claims a model that its chunks are not of."""
    content = {key: bytes(store.read(key) or b"") for key in store.keys()}  # noqa: SIM118
    write_folder(tmp_path / "pack", content)
    with pytest.raises(CorruptChunk, match="not of the namespace"):
        import_pack(tmp_path / "pack", tmp_path / "store")
    assert list(LocalStore(tmp_path / "store").keys()) == []


@pytest.mark.parametrize("content", [{}, {"README.md": b"hello"}, {MANIFEST: b"{}"}, {MANIFEST: b""}])
def test_a_folder_that_is_not_a_pack_is_refused(tmp_path: Path, content: dict[str, bytes]) -> None:
    for name, raw in content.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(StoreError, match=r"no pack|another format|no JSON"):
        import_pack(tmp_path, MemoryStore())


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(StoreError, match="not a plain file"):
        open_folder_pack(tmp_path)


def test_a_missing_package_is_said_at_opening(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(StoreError, match=r'pip install "cake-hf\[hub\]"'):
        open_folder_pack(pack)


# Snapshots of recurrent states.


@pytest.fixture(params=here("qwen3_next", "falcon_h1", "lfm2"))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recurrent(tmp_path: Path, family: str) -> Path:
    """A pack of a model with recurrent states: all chunks of the prompt, and the snapshot at the end of the last one."""
    model, ids = family_model(family), family_runs.IDS
    export_pack(filled_store(model, ids), tmp_path / "recurrent", model, ids, chunk_size=CHUNK)
    return tmp_path / "recurrent"


def loaded_from(family: str, store: Store) -> tuple[int, int]:
    """The chunks and snapshots that were loaded for the prompt; what came of it is checked."""
    with CakeCache(family_model(family), store, chunk_size=CHUNK, strategy="load", save=False) as cache:
        family_runs.check(family, family_runs.generate(family_model(family), cache), "from a pack")
        return cache.report.chunks_loaded, cache.report.states_loaded


def test_a_pack_brings_the_snapshot_that_its_chunks_need(recurrent: Path, family: str) -> None:
    opened = open_folder_pack(recurrent)
    (state,) = opened.manifest.states
    last = opened.manifest.chunks[-1]
    assert (state.key, state.index) == (state_key(last.key), last.index)
    assert opened.manifest.nbytes == sum(path.stat().st_size for path in recurrent.rglob("*.safetensors"))
    assert "| snapshots | 1, of the model's recurrent state |" in (recurrent / CARD).read_text()
    assert loaded_from(family, opened) == (family_runs.CHUNKS, 1)
    # Negative control: without it the same chunks are of no use.
    (recurrent / MANIFEST).write_bytes(replace(opened.manifest, states=()).to_json())
    assert loaded_from(family, open_folder_pack(recurrent)) == (0, 0)


def test_a_snapshot_comes_into_a_store(recurrent: Path, family: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = family_runs.CHUNKS + 1
    imported = import_pack(
        recurrent, tmp_path / "store", model=family_model(family), progress=lambda *at: seen.append(at)
    )
    assert (imported.chunks, imported.states) == (family_runs.CHUNKS, 1)
    assert imported.nbytes == imported.manifest.nbytes
    assert seen == [(done, files) for done in range(files + 1)]
    local, saved = LocalStore(tmp_path / "store"), filled_store(family_model(family), family_runs.IDS)
    assert sorted(local.keys()) == sorted(saved.keys())
    assert all(read_whole(local, key) == read_whole(saved, key) for key in saved.keys())  # noqa: SIM118
    assert loaded_from(family, local) == (family_runs.CHUNKS, 1)
    assert local.delete(imported.manifest.states[0].key)
    again = import_pack(recurrent, local)
    assert (again.chunks, again.states, again.nbytes) == (0, 1, imported.manifest.states[0].size)


@pytest.mark.parametrize("where", [0, 4200, -1])
def test_a_damaged_snapshot_is_refused_everywhere(recurrent: Path, family: str, where: int, tmp_path: Path) -> None:
    (state,) = open_folder_pack(recurrent).manifest.states
    flip(recurrent / chunk_path(state.key), where)
    opened = open_folder_pack(recurrent)
    with pytest.raises(CorruptChunk, match="not the one that its manifest names"):
        opened.read(state.key)
    assert loaded_from(family, opened)[1] == 0
    assert [bad.key for bad in verify(opened, lambda *_: None).bad] == [state.key]
    with pytest.raises(CorruptChunk, match=state.key):
        import_pack(recurrent, tmp_path / "store")
    assert state.key not in set(LocalStore(tmp_path / "store").keys())


def test_a_damaged_snapshot_is_not_published(tmp_path: Path, family: str) -> None:
    model, ids = family_model(family), family_runs.IDS
    store = filled_store(model, ids)
    (key,) = take_inventory(store, lambda *_: None).states
    store.write(key, [(raw := read_whole(store, key))[:-1], bytes([raw[-1] ^ 1])], replace=True)
    with pytest.raises(CorruptChunk, match=f"{key} does not match its checksum"):
        export_pack(store, tmp_path / "pack", model, ids, chunk_size=CHUNK)


def test_what_looks_at_stores_sees_a_packs_snapshots(recurrent: Path, family: str) -> None:
    opened, chunks = open_folder_pack(recurrent), family_runs.CHUNKS
    verified = verify(opened, lambda *_: None)
    assert (verified.checked, verified.nbytes, verified.bad) == (chunks + 1, opened.manifest.nbytes, [])
    inventory = take_inventory(opened, lambda *_: None)
    assert (len(inventory.chunks), len(inventory.states), inventory.unreadable) == (chunks, 1, {})
    job = RecomputeJob("", [], 1.0, warmed=WarmedOptions(chunk_size=CHUNK))
    result = recompute_prompt(job, opened, family_model(family), family_runs.IDS, "a prompt")
    assert (result.sampled, result.stored, result.bad) == (chunks + 1, chunks + 1, [])


@pytest.mark.parametrize("family", here("lfm2"))
def test_every_snapshot_of_the_prompt_goes_along_and_no_other(family: str, tmp_path: Path) -> None:
    model, ids, store = family_model(family), family_runs.IDS, MemoryStore()
    for tokens in (ids, prompt(4 * CHUNK, seed=9)):
        with CakeCache(model, store, chunk_size=CHUNK, snapshot_every=2) as cache:
            cache.prefill(tokens, whole=True)
    manifest = export_pack(store, tmp_path / "all", model, ids, chunk_size=CHUNK)
    assert [state.index for state in manifest.states] == [1, 3, 5]
    assert loaded_from(family, open_folder_pack(tmp_path / "all")) == (family_runs.CHUNKS, 1)
    store.delete(manifest.chunks[3].key)  # a snapshot without its chunk is left out
    manifest = export_pack(store, tmp_path / "all", model, ids, chunk_size=CHUNK)
    assert [state.index for state in manifest.states] == [1, 5]
    beginning = export_pack(store, tmp_path / "all", model, ids[:, :CHUNK], chunk_size=CHUNK)
    assert (len(beginning.chunks), beginning.states) == (1, ())
    assert len(list((tmp_path / "all").rglob("*.safetensors"))) == 1  # of the older pack no snapshot is left


# Helpers.


def flip(path: Path, where: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


def index_of(store: Store, key: str) -> int:
    return parse_header(store.read(key) or b"")[0].index


def without(store: Store, holes: set[int]) -> MemoryStore:
    """A copy of a store that lacks these chunks."""
    copied = MemoryStore()
    for key in store.keys():  # noqa: SIM118 (a store is no dict)
        if index_of(store, key) not in holes:
            copied.write(key, [store.read(key) or b""])
    return copied
