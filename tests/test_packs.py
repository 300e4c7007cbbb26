"""Packs in folders: what comes out of a store goes into another, bit for bit, and nothing else does."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cake_hf import CakeCache, LocalStore, MemoryStore, Store
from cake_hf.arithmetic.errors import CorruptChunk, StoreError
from cake_hf.people.packs import export_pack, import_pack
from cake_hf.stores.manifest import (
    BLOCK_BYTES,
    CARD,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PackManifest,
    chunk_path,
    parse_manifest,
    printable,
)
from cake_hf.stores.mismatch import why_not
from cake_hf.stores.pack import PackSource, PackStore, open_folder_pack
from cake_hf.tensors.codec import checksum, parse_header
from cake_hf.testing import GateStore, ReadOnlyContract, WrapperStore
from cake_hf.testing.contract import key_of, read_whole, value_of
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run, shared_model
from pack_files import FACTS, manifest_of, write_folder

FUZZ = int(os.environ.get("CAKE_HF_FUZZ", "2000"))
"""Mutations of a manifest; the soak run takes 100,000."""


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return shared_model("llama")


@pytest.fixture(scope="module")
def store(model: torch.nn.Module) -> MemoryStore:
    """A store with all chunks of the prompt."""
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt(), whole=True)
    return store


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


@pytest.mark.parametrize("sin", ["writes", "says it writes", "pads", "forgets"])
def test_the_contract_for_reading_finds_a_careless_store(tmp_path: Path, sin: str) -> None:
    class Careless(MemoryStore):
        read_only = sin != "says it writes"

        def read_range(self, key: str, parts: Any, offset: int) -> bool:
            with_room = [memoryview(bytearray(part.nbytes)) for part in parts]
            return super().read_range(key, parts if sin != "forgets" else with_room, offset)

    contract = ReadOnlyContract()
    filled = Careless()
    for number, size in {1: 1000, 2: 15_000, 3: 2**22 + 1, 4: 1}.items():
        filled.write(key_of(number), [value_of(number, size)])
    contract.test_a_value_comes_back(filled, 1)
    test, extra = (
        (contract.test_a_range_comes_back, (1, 1, [5]))
        if sin == "forgets"
        else (contract.test_nothing_can_be_written, ())
    )
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(filled, *extra)


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
        assert cache.report.reason == "the store has none of the prompt's chunks yet"
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
    """Other KV under a checksum of its own: a plain store serves it, a pack does not."""
    key = open_folder_pack(pack).manifest.chunks[5].key
    path = pack / chunk_path(key)
    path.write_bytes(lie(path.read_bytes()))
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


def test_what_a_stranger_wrote_does_not_reach_the_terminal() -> None:
    evil = "\x1b[2J\u202e" + "x" * 500
    theirs = {"format": "1", "chunk_size": 16, "model": {evil: evil}, "layout": {"a": {"dtype": evil}}}
    for there, here in [(theirs, {**theirs, "model": {}}), (theirs, {**theirs, "layout": {"a": {"dtype": "F32"}}})]:
        text = why_not(there, False, here)
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
    assert len(files) == CHUNKS + 2
    assert not any(salt.encode() in path.read_bytes() for path in files)


def test_what_is_not_in_the_store_is_left_out(tmp_path: Path, model: torch.nn.Module, store: MemoryStore) -> None:
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


def test_what_is_no_prompt_is_refused(tmp_path: Path, model: torch.nn.Module, store: MemoryStore) -> None:
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
def test_what_is_no_pack_is_said(tmp_path: Path, content: dict[str, bytes]) -> None:
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


# The manifest, and those who write another one.

CONTENT = {key_of(1): value_of(1), key_of(2): value_of(2, BLOCK_BYTES + 10)}


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(manifest_of(CONTENT).to_json())
    change(fields)
    return json.dumps(fields).encode()


def test_the_manifest_of_the_tests_is_good() -> None:
    """So that what follows fails for what was changed."""
    assert parse_manifest(changed(lambda fields: None)) == manifest_of(CONTENT)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda m: m.update(format="zip"),
    "another version": lambda m: m.update(version="2"),
    "no version": lambda m: m.pop("version"),
    "a field more": lambda m: m.update(script="run me"),
    "a field less": lambda m: m.pop("dtype"),
    "a path as a key": lambda m: m["chunks"][0].update(key="../../etc/passwd"),
    "a path in a key": lambda m: m["chunks"][0].update(key="../" + "a" * 37),
    "a key in capitals": lambda m: m["chunks"][0].update(key="A" * 40),
    "a key with an end of line": lambda m: m["chunks"][0].update(key="a" * 40 + "\n"),
    "one key twice": lambda m: m["chunks"][1].update(key=m["chunks"][0]["key"]),
    "one place twice": lambda m: m["chunks"][1].update(index=0),
    "out of order": lambda m: m["chunks"].reverse(),
    "a negative place": lambda m: m["chunks"][0].update(index=-1),
    "no chunks": lambda m: m.update(chunks=[]),
    "chunks as an object": lambda m: m.update(chunks={"0": m["chunks"][0]}),
    "a chunk as a number": lambda m: m["chunks"].append(7),
    "a negative size": lambda m: m["chunks"][0].update(size=-1),
    "a size of nothing": lambda m: m["chunks"][0].update(size=0, blocks=[]),
    "a huge size": lambda m: m["chunks"][0].update(size=2**40),
    "a size that is a float": lambda m: m["chunks"][0].update(size=1000.0),
    "a size that is a text": lambda m: m["chunks"][0].update(size="1000"),
    "a size that is true": lambda m: m["chunks"][0].update(size=True),
    "a digest too short": lambda m: m["chunks"][0].update(blake3="ab"),
    "no digest": lambda m: m["chunks"][0].pop("blake3"),
    "blocks missing": lambda m: m["chunks"][1]["blocks"].pop(),
    "blocks too many": lambda m: m["chunks"][0]["blocks"].append("a" * 64),
    "a block that is a number": lambda m: m["chunks"][0].update(blocks=[5]),
    "more in a chunk": lambda m: m["chunks"][0].update(url="http://elsewhere"),
    "tokens that do not fit": lambda m: m.update(tokens=[0, 99]),
    "tokens that are none": lambda m: m.update(tokens=5),
    "a chunk size that does not fit": lambda m: m.update(chunk_size=32, tokens=[0, 64]),
    "a chunk size of one": lambda m: m.update(chunk_size=1),
    "facts of another namespace": lambda m: m["facts"].update(model={"class": "Large"}),
    "facts with a salt": lambda m: m["facts"].update(salt="s"),
    "facts that are none": lambda m: m.update(facts=[]),
    "facts without an end": lambda m: m["facts"].update(deep=deep(50)),
    "another namespace": lambda m: m.update(namespace="a" * 40),
    "a namespace in capitals": lambda m: m.update(namespace="A" * 40),
    "a flag that is a number": lambda m: m.update(salted=0),
    "a name with a control character": lambda m: m.update(model="\x1b[2J"),
    "a name without end": lambda m: m.update(model="x" * 1000),
    "a dtype with a path": lambda m: m.update(dtype="../F32"),
    "a revision that is none": lambda m: m.update(model_revision="main"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_manifest_is_refused_in_one_sentence(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(StoreError) as caught:
        parse_manifest(changed(change))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"format":' * 5000,
        b'{"format": "cake_hf-pack", "format": "cake_hf-pack"}',
        b'{"format": "cake_hf-pack", "version": ' + b"9" * 5000 + b"}",
        b"PK\x03\x04",
        b"\x80\x04\x95",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(StoreError):
        parse_manifest(raw)


@pytest.mark.parametrize(
    "flood",
    [
        b"[" + b"{}," * (MAX_MANIFEST_BYTES // 3),
        b"[" + b"[]," * (MAX_MANIFEST_BYTES // 3 - 9) + b"[]]",
        b"[" + b"0," * (MAX_MANIFEST_BYTES // 2 - 9) + b"0]",
        b"[" + b'{"a":1},' * 350_000 + b"{}]",
        b'{"format": "' + b"x" * (MAX_MANIFEST_BYTES - 99) + b'"}',
        b'{"format": "\\ud83d\\ude00' + b"x" * (MAX_MANIFEST_BYTES - 99) + b'"}',
        b"x" * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=["objects", "lists", "numbers", "as many objects as may be", "one text", "one wide text", "too long"],
)
def test_a_flood_is_bounded_in_memory(flood: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            parse_manifest(flood)
        assert tracemalloc.get_traced_memory()[1] <= 6.5 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()


def test_mutated_manifests_give_typed_errors_only() -> None:
    """Each mutation is refused with a StoreError, or is a manifest that a pack can be asked about."""
    generator = random.Random(5)
    good = [manifest_of(CONTENT).to_json(), manifest_of(CONTENT, salted=True).to_json()]
    refused = 0
    tracemalloc.start()
    try:
        for number in range(FUZZ):
            pack = opened_or_refused(mutated(good[number % 2], generator))
            if pack is None:
                refused += 1
                continue
            assert pack.contains([*pack.keys(), "?"]) == [True] * len(pack.manifest.chunks) + [False]
            assert all(re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{40}\.safetensors", chunk_path(key)) for key in pack.keys())  # noqa: SIM118
            assert pack.objection("0" * 40, lambda: FACTS).isprintable()
            for chunk in pack.manifest.chunks:
                with pytest.raises(StoreError):  # its digest is not that of the zeros which are read
                    pack.read_into(chunk.key, [memoryview(bytearray(1000))])
        assert tracemalloc.get_traced_memory()[1] <= 2 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()
    assert refused > FUZZ // 2


def opened_or_refused(raw: bytes) -> PackStore | None:
    try:
        return PackStore(Fixed(raw))
    except StoreError:
        return None


class Fixed(PackSource):
    """A source whose manifest is given and whose files are zeros."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def __str__(self) -> str:
        return "fixed"

    def manifest(self, most: int) -> bytes:
        return self._raw[: most + 1]

    def fetch(self, path: str, parts: Any, offset: int) -> None:
        pass


def mutated(good: bytes, generator: random.Random) -> bytes:
    """A manifest with a few bytes wrong, or with something else in the place of a value."""
    if generator.random() < 0.5:
        raw = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(raw) or 1)
            kind = generator.randrange(4)
            if kind == 0:
                raw[at : at + 1] = bytes([generator.randrange(256)])
            elif kind == 1:
                raw[at:at] = generator.randbytes(generator.randint(1, 5))
            elif kind == 2:
                del raw[at : at + generator.randint(1, 50)]
            else:
                raw = raw[: max(1, at)]
        return bytes(raw)
    fields = json.loads(good)
    for _ in range(generator.randint(1, 2)):
        place = generator.choice(list(places(fields)))
        owner, name = place
        junk: list[Any] = [
            None,
            True,
            -1,
            0,
            2**64,
            1e308,
            float("nan"),
            "",
            "x" * 300,
            "../x",
            [],
            {},
            [[]],
            "\ud800",
            deep(40),
        ]
        if generator.random() < 0.3 and isinstance(owner, dict):
            owner[generator.choice(["__class__", "key", "size", "x"])] = generator.choice(junk)
        elif generator.random() < 0.2:
            del owner[name]
        else:
            owner[name] = generator.choice(junk)
    return json.dumps(fields).encode()


def places(value: Any) -> Any:
    """All (container, key) pairs in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in list(items):
        yield value, name
        yield from places(inner)


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def test_a_name_is_made_fit_for_a_manifest() -> None:
    assert printable("org/model") == "org/model"
    assert printable("a\x1b[2J\udc80b") == "a?[2J?b"
    assert len(printable("x" * 999)) == 200


def test_too_much_for_a_manifest_is_said_when_it_is_written() -> None:
    chunks = manifest_of(CONTENT).chunks
    with pytest.raises(StoreError):
        manifest_of({}, chunks=(chunks[0], chunks[0])).to_json()


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


def lie(raw: bytes) -> bytes:
    """A chunk with other KV and a checksum that fits it."""
    (length,) = struct.unpack("<Q", raw[:8])
    payload = bytes(len(raw) - 8 - length)
    honest, forged = parse_header(raw)[0].checksum, checksum([payload])
    return raw[: 8 + length].replace(honest.encode(), forged.encode()) + payload
