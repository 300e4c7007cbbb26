"""The command line on a store of its own: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import cake_hf
from cake_hf import CakeCache
from cake_hf.cli.app import app
from cake_hf.cli.inspect_store import existing_store, prompts, take_inventory
from cake_hf.stores import LocalStore, MemoryStore
from cake_hf.testing import WrapperStore
from commands import save_model, write_text
from faulty import Faulty, raising
from lent import Lend

pytest_plugins = ["lent"]

CHUNK = 16
CHUNKS = 5
WORDS = CHUNK * CHUNKS + 3
CHUNK_BYTES = CHUNK * 3 * 2 * 2 * 16 * 4
"""3 layers, keys and values, 2 heads of 16 float32 numbers."""

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose tokens are the words "w3" to "w127"."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    return write_text(tmp_path / "document.txt", WORDS)


@pytest.fixture
def store(tmp_path: Path, model_folder: Path, document: Path, command: Command) -> Path:
    """A store that was warmed with the document."""
    folder = tmp_path / "store"
    assert warm(command, model_folder, document, folder).exit_code == 0
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `cake-hf` with these arguments."""
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def warm(command: Command, model: Path, file: Path, store: Path | str, *more: object) -> Result:
    return command("warm", model, file, "--store", store, "--chunk-size", CHUNK, *more)


def flip_payload(store: Path, key: str) -> None:
    path = store / key[:2] / f"{key}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)


def keys_of(store: Path) -> list[str]:
    return sorted(LocalStore(store).keys())


def flat(text: str) -> str:
    """Without the tables' frames and line breaks."""
    return re.sub(r"[\s│┃╭╮╰╯─━]+", " ", text)


def test_version_option_prints_the_version(command: Command) -> None:
    result = command("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"cake-hf {cake_hf.__version__}"


def test_help_names_every_command(command: Command) -> None:
    result = command("--help")
    assert result.exit_code == 0
    for name in ("warm", "ls", "info", "verify", "gc"):
        assert name in result.output


def test_warming_twice_loads(tmp_path: Path, model_folder: Path, document: Path, command: Command) -> None:
    folder = tmp_path / "store"
    first = warm(command, model_folder, document, folder)
    assert first.exit_code == 0, first.output
    assert f"0 loaded, {CHUNKS} computed" in flat(first.output)
    assert f"saved {CHUNKS} chunks" in flat(first.output)
    assert f"store='{folder}', chunk_size={CHUNK}" in flat(first.output).replace("' ,", "',")
    assert len(keys_of(folder)) == CHUNKS
    second = warm(command, model_folder, document, folder)
    assert second.exit_code == 0, second.output
    assert "0 missed, 0 failed" in flat(second.output)
    assert "saved 0 chunks" in flat(second.output)
    assert len(keys_of(folder)) == CHUNKS


def test_a_full_last_chunk_is_warmed_too(tmp_path: Path, model_folder: Path, command: Command) -> None:
    exact = write_text(tmp_path / "exact.txt", CHUNK * 3)
    assert warm(command, model_folder, exact, tmp_path / "store").exit_code == 0
    assert len(keys_of(tmp_path / "store")) == 3


def test_salt_dtype_exactness_and_length_choose_the_chunks(
    store: Path, model_folder: Path, document: Path, command: Command
) -> None:
    options = [("--salt", "a"), ("--dtype", "bfloat16"), ("--no-exact",), ("--salt", "b", "--tokens", 2 * CHUNK)]
    for more in options:
        assert warm(command, model_folder, document, store, *more).exit_code == 0
    assert len(keys_of(store)) == 4 * CHUNKS + 2 + 1  # and with --no-exact what the model computes
    output = flat(command("ls", store).output)
    assert "BF16" in output
    assert output.count("tiny") == 10  # five namespaces, five prompts


def test_ls_shows_namespaces_and_prompts(
    tmp_path: Path, store: Path, model_folder: Path, document: Path, command: Command
) -> None:
    words = document.read_text().split()
    other = tmp_path / "other.txt"
    other.write_text(" ".join([*words[: 2 * CHUNK], *(["w9"] * (2 * CHUNK))]))
    assert warm(command, model_folder, other, store).exit_code == 0
    result = command("ls", store)
    assert result.exit_code == 0, result.output
    assert re.search(rf"tiny +F32 +{CHUNK} +{CHUNKS + 2} +{CHUNK * (CHUNKS + 2)} ", flat(result.output))
    with existing_store(str(store)) as opened:
        chains = prompts(take_inventory(opened, lambda done, total: None))
    assert [(chain.tokens(CHUNK), chain.chunks) for chain in chains] == [
        (CHUNK * CHUNKS, CHUNKS),
        (CHUNK * 4, 4),
    ]
    for chain in chains:
        assert chain.leaf.metadata.key[:12] in result.output
    assert "1 shorter prompt" in flat(command("ls", store, "--prompts", 1).output)


def test_ls_says_where_a_prompt_has_a_hole(store: Path, command: Command) -> None:
    with existing_store(str(store)) as opened:
        chunks = take_inventory(opened, lambda done, total: None).chunks
        key = next(key for key, chunk in chunks.items() if chunk.metadata.index == 1)
        opened.delete(key)
        chains = prompts(take_inventory(opened, lambda done, total: None))
    assert [(chain.leaf.metadata.index, chain.first) for chain in chains] == [(4, 2), (0, 0)]
    assert "chunk 1" in flat(command("ls", store).output)


@pytest.mark.parametrize("method", ["read", "read_into"])
def test_listing_reads_headers_only(store: Path, lend: Lend, command: Command, method: str) -> None:
    whole = raising(lambda: AssertionError("a whole chunk was read"))
    url = lend(lambda: Faulty(LocalStore(store), method, whole))
    assert command("ls", url).exit_code == 0
    assert command("info", url).exit_code == 0


def test_any_store_can_be_listed(store: Path) -> None:
    with LocalStore(store) as local, MemoryStore() as memory:
        for key in local.keys():  # noqa: SIM118 - a store is no dict
            memory.write(key, [local.read(key)])
        inventories = [take_inventory(each, lambda done, total: None) for each in (local, memory)]
    assert inventories[0] == inventories[1]


def test_an_empty_store(tmp_path: Path, command: Command) -> None:
    assert "empty" in command("ls", tmp_path).output
    assert "0 chunks" in command("verify", tmp_path).output


def test_pull_of_a_folder_by_its_bare_name_says_how(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pk").mkdir()
    monkeypatch.chdir(tmp_path)
    result = command("pull", "pk", "st")
    assert result.exit_code == 2
    assert "cake-hf pull ./pk st." in flat(result.stderr)


def test_info_and_verify_count_alike(tmp_path: Path, model_folder: Path, document: Path, command: Command) -> None:
    """With --no-exact there is also a record of what the model computes."""
    store = tmp_path / "store"
    assert warm(command, model_folder, document, store, "--no-exact").exit_code == 0
    assert f"{CHUNKS + 1} chunks" in flat(command("verify", store).output)
    assert f"chunks {CHUNKS + 1} (1 chunk of states or recorded results)" in flat(command("info", store).output)
    assert "and 1 chunk of states or recorded results" in flat(command("ls", store).output)


def test_info_of_a_store(store: Path, command: Command) -> None:
    output = flat(command("info", store).output)
    assert f"chunks {CHUNKS}" in output
    assert f"tokens {CHUNK * CHUNKS}" in output
    assert "prompts 1" in output


def test_info_of_a_chunk(store: Path, command: Command) -> None:
    key = keys_of(store)[0]
    result = command("info", store, key[:12])
    assert result.exit_code == 0, result.output
    assert key in result.output
    assert f"6 of F32, [{CHUNK}, 2, 16]" in flat(result.output)


def test_info_wants_one_chunk(store: Path, command: Command) -> None:
    for prefix, complaint in (("", None), ("zz", "No chunk's key starts with zz")):
        result = command("info", store, prefix)
        assert (result.exit_code == 2) is (complaint is not None)
        assert complaint is None or complaint in flat(result.stderr)


def test_an_ambiguous_key(tmp_path: Path, command: Command) -> None:
    with LocalStore(tmp_path) as local:
        for last in "ab":
            local.write("0" * 39 + last, [b"x"])
    result = command("info", tmp_path, "000")
    assert result.exit_code == 2
    assert "2 chunks have keys that start with 000" in flat(result.stderr)


def test_verify_a_good_store(store: Path, command: Command) -> None:
    result = command("verify", store)
    assert result.exit_code == 0
    assert f"All is well: {CHUNKS} chunks" in flat(result.output)


def test_verify_names_a_damaged_chunk_and_delete_heals(
    store: Path, model_folder: Path, document: Path, command: Command
) -> None:
    key = keys_of(store)[2]
    flip_payload(store, key)
    found = command("verify", store)
    assert found.exit_code == 1
    assert key in found.output
    assert "--fix" in found.output
    assert [other for other in keys_of(store) if other in found.output] == [key]
    healed = command("verify", store, "--fix")
    assert healed.exit_code == 0
    assert "1 chunk deleted" in flat(healed.output)
    assert command("verify", store).exit_code == 0
    assert len(keys_of(store)) == CHUNKS - 1
    assert warm(command, model_folder, document, store).exit_code == 0
    assert len(keys_of(store)) == CHUNKS


def test_a_chunk_that_cannot_be_read_is_not_deleted(store: Path, lend: Lend, command: Command) -> None:
    """A failing disk or a wrong mode is no proof that the chunk is bad."""
    fail = raising(lambda: cake_hf.StoreError("The disk reports a fault; check it."))
    result = command("verify", lend(lambda: Faulty(LocalStore(store), "read", fail)), "--fix")
    assert result.exit_code == 1
    assert "check it" in flat(result.output)
    assert len(keys_of(store)) == CHUNKS


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"no safetensors at all",
        lambda raw: raw[:-1],
        lambda raw: struct.pack("<Q", 2**60) + raw[8:],
        lambda raw: raw.replace(b'"shape"', b'"shabe"'),
        lambda raw: raw.replace(b'"F32","shape":[16,2,16]', b'"F32","shape":["16",2,1]'),
    ],
    ids=["empty", "garbage", "cut", "huge header", "no shape", "odd shape"],
)
def test_ls_survives_damaged_headers(store: Path, damage: Callable[[bytes], bytes], command: Command) -> None:
    key = keys_of(store)[0]
    path = store / key[:2] / f"{key}.safetensors"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    result = command("ls", store)
    assert result.exit_code == 0, result.output
    assert "1 chunk cannot be read" in flat(result.output)


@pytest.mark.parametrize("name", ["ls", "info", "verify"])
def test_looking_at_no_store_makes_none(tmp_path: Path, name: str, command: Command) -> None:
    missing = tmp_path / "missing"
    for spec in (missing, f"file://{missing}"):
        result = command(name, spec)
        assert result.exit_code == 2
        assert f"There is no store at {missing}" in flat(result.stderr)
        assert "Traceback" not in result.output
    assert not missing.exists()


def test_unknown_store_url(command: Command) -> None:
    result = command("ls", "gopher://nowhere")
    assert result.exit_code == 2
    assert "Unknown store URL" in flat(result.stderr)


def test_a_file_is_no_store(document: Path, command: Command) -> None:
    result = command("verify", document)
    assert result.exit_code == 2
    assert "is a file" in flat(result.stderr)


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("model", "There is no folder"),
        ("weights", "cannot be loaded"),
        ("file", "cannot be read"),
        ("binary", "is not UTF-8 text"),
        ("short", "less than one chunk"),
        ("long", "the model was made for 4,096"),
        ("device", "device 'gpu9' cannot be used"),
    ],
)
def test_inputs_that_cannot_be_warmed_are_refused(
    tmp_path: Path, model_folder: Path, document: Path, command: Command, case: str, complaint: str
) -> None:
    model, file, more = model_folder, document, []
    if case == "model":
        model = tmp_path / "no" / "model"
    elif case == "weights":
        model = tmp_path / "half"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    elif case == "file":
        file = tmp_path / "no.txt"
    elif case == "binary":
        file = tmp_path / "binary.txt"
        file.write_bytes(b"\xff\xfe\xfa")
    elif case == "short":
        file = write_text(tmp_path / "short.txt", CHUNK - 1)
    elif case == "long":
        file = write_text(tmp_path / "long.txt", 4097)
    else:
        more = ["--device", "gpu9"]
    result = warm(command, model, file, tmp_path / "store", *more)
    assert result.exit_code == 2, result.output
    assert complaint in flat(result.stderr)
    assert "Traceback" not in result.output


def test_chunks_that_were_not_saved_are_an_error(
    model_folder: Path, document: Path, lend: Lend, command: Command
) -> None:
    full = raising(lambda: cake_hf.StoreError("No space left on device: free some space."))
    result = warm(command, model_folder, document, lend(lambda: Faulty(MemoryStore(), "write", full)))
    assert result.exit_code == 2
    assert f"{CHUNKS} chunks could not be saved" in flat(result.stderr)


class WritesWhenWaitedFor(WrapperStore):
    """One that is so slow that it writes only while a cache is being flushed."""

    waited_for = threading.Event()

    def write(self, key: str, parts: Sequence[Any], *, replace: bool = False) -> bool:
        assert self.waited_for.wait(60)
        return super().write(key, parts, replace=replace)


def test_a_store_slower_than_the_model_is_waited_for(
    model_folder: Path, document: Path, monkeypatch: pytest.MonkeyPatch, lend: Lend, command: Command
) -> None:
    """The queue has room for two chunks."""
    waited_for, flush = WritesWhenWaitedFor.waited_for, CakeCache.flush

    def wait(self: CakeCache, timeout: float | None = None) -> bool:
        waited_for.set()
        try:
            return flush(self, timeout)
        finally:
            waited_for.clear()

    monkeypatch.setattr(CakeCache, "flush", wait)
    monkeypatch.setenv("CAKE_HF_SAVE_QUEUE_BYTES", str(2 * CHUNK_BYTES))
    store, hurried = MemoryStore(), MemoryStore()
    result = warm(command, model_folder, document, lend(lambda: WritesWhenWaitedFor(store)))
    assert result.exit_code == 0, result.output
    assert len(list(store.keys())) == CHUNKS
    model, words = AutoModelForCausalLM.from_pretrained(model_folder), document.read_text().split()
    with CakeCache(model, WritesWhenWaitedFor(hurried), chunk_size=CHUNK) as cache:  # negative control: no wait
        report = cache.prefill(torch.tensor([[int(word[1:]) for word in words]]))
        assert cache.flush(60)
    assert report.chunks_unsaved
