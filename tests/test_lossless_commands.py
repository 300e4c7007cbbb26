"""The commands on a store of encoded chunks, or of both forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, LocalStore, MemoryStore, Store
from cake_hf.chunks.encoded_header import is_encoded
from cake_hf.cli import verify as verify_module
from cake_hf.cli.inspect_store import take_inventory
from cake_hf.cli.recode import recode
from cake_hf.cli.verify import verify
from cake_hf.testing.forgery import forge, one_bit
from commands import LOOKING, flat, look_at, no_progress, run_command, save_model, write_text
from families import family_model
from family_runs import IDS as FAMILY_IDS
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from pack_files import write_folder
from stored import values_of

TEXT_CHUNKS = 6


def filled(store: Any, codec: str) -> Any:
    with CakeCache(shared_model("llama", "bfloat16"), store, chunk_size=CHUNK, codec=codec) as cache:
        cache.prefill(prompt(), whole=True)
        assert cache.flush(60)
    return store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def warmed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store, and the text that is in it."""
    folder = tmp_path_factory.mktemp("warmed")
    text = write_text(folder / "text.txt", CHUNK * TEXT_CHUNKS + 3)
    answer = run_command(
        "warm", model, text, "--store", folder / "store", "--chunk-size", CHUNK, "--dtype", "bfloat16", "--codec", "lossless"
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert "codec='lossless'" in flat(answer.output)
    return folder / "store", text


def test_warm_encodes(warmed: tuple[Path, Path]) -> None:
    found = values_of(LocalStore(warmed[0]))
    assert len(found) == TEXT_CHUNKS
    assert all(map(is_encoded, found.values()))


def test_an_unknown_codec_is_refused(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", 40)
    answer = run_command("warm", model, text, "--store", tmp_path / "store", "--codec", "zip")
    assert answer.exit_code == 2
    assert all(name in flat(answer.output) for name in ("none", "lossless", "auto"))


@pytest.mark.parametrize("command", LOOKING)
def test_commands_that_look(command: str, warmed: tuple[Path, Path]) -> None:
    look_at(warmed[0], command)


def test_info_tells_the_codec(warmed: tuple[Path, Path]) -> None:
    key = next(LocalStore(warmed[0]).keys())
    answer = run_command("info", warmed[0], key[:12])
    assert answer.exit_code == 0
    assert "lossless: 0." in flat(answer.output)
    assert "BF16" in answer.output


def test_the_inventory_says_the_same_of_both_forms() -> None:
    raw, encoded = (take_inventory(filled(MemoryStore(), codec), no_progress) for codec in ("none", "lossless"))
    assert not raw.unreadable
    assert not encoded.unreadable
    assert raw.chunks.keys() == encoded.chunks.keys()
    for key, chunk in raw.chunks.items():
        other = encoded.chunks[key]
        assert (chunk.metadata, chunk.table, chunk.chunk_size) == (other.metadata, other.table, other.chunk_size)
        assert (chunk.codec, other.codec) == ("none", "lossless")
        assert other.file_bytes < chunk.file_bytes
    assert encoded.file_bytes < 0.85 * raw.file_bytes  # most of so small a file is its header


def test_recompute_compares_what_is_encoded(warmed: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    given = (
        "--recompute",
        "100%",
        "--model",
        model,
        "--prompt",
        warmed[1],
        "--chunk-size",
        CHUNK,
        "--dtype",
        "bfloat16",
    )
    answer = run_command("verify", warmed[0], *given)
    assert answer.exit_code == 0, answer.output
    forged = LocalStore(tmp_path / "forged")
    for key, value in values_of(LocalStore(warmed[0])).items():
        forged.write(key, [forge(value, one_bit)])
    assert all(map(is_encoded, values_of(forged).values()))
    assert run_command("verify", forged.root, "--deep").exit_code == 0
    answer = run_command("verify", forged.root, *given)
    assert answer.exit_code == 1
    assert "is not what the model computes" in flat(answer.output)


@pytest.mark.fault(
    "Files", "A bit of an encoded chunk's file changes.", "`cake-hf verify` names it; `--fix` deletes it."
)
@pytest.mark.parametrize("whole_bytes", [2**26, 100])
@pytest.mark.parametrize("at", [0.6, 0.9, 0.999])
@pytest.mark.parametrize("deep", [False, True])
def test_verify_finds_damage(at: float, deep: bool, whole_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "WHOLE_BYTES", whole_bytes)  # larger chunks are read in steps
    monkeypatch.setattr(verify_module, "STEP_BYTES", 1000)
    store = filled(MemoryStore(), "lossless")
    assert verify(store, no_progress, deep=deep).bad == []
    key, value = next(iter(values_of(store).items()))
    wrong = bytearray(value)
    wrong[int(len(value) * at)] ^= 4
    store.write(key, [wrong], replace=True)
    assert [bad.key for bad in verify(store, no_progress, deep=deep).bad] == [key]


def test_verify_fix_leaves_newer_chunks() -> None:
    store = filled(MemoryStore(), "lossless")
    key, value = next(iter(values_of(store).items()))
    newer = value.replace(b'"version":"3"', b'"version":"4"').replace(b'"checksums"', b'"digests__"')
    store.write(key, [newer], replace=True)
    [bad] = verify(store, no_progress).bad
    assert (bad.key, bad.corrupt) == (key, False)
    assert verify_module.delete(store, [bad]) == 0


# Packs.


def test_an_exported_pack_serves_encoded_chunks(warmed: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    pack, target = tmp_path / "pack", tmp_path / "pulled"
    options = ("--chunk-size", CHUNK, "--dtype", "bfloat16")
    answer = run_command("export", warmed[0], pack, "--model", model, "--prompt", warmed[1], *options)
    assert answer.exit_code == 0, answer.output
    answer = run_command("pull", f"pack:{pack}", target)
    assert answer.exit_code == 0, answer.output
    assert values_of(LocalStore(target)) == values_of(LocalStore(warmed[0]))


def test_a_pack_is_read_in_both_forms(tmp_path: Path) -> None:
    tiny = shared_model("llama", "bfloat16")
    for codec in ("none", "lossless"):
        pack = write_folder(tmp_path / codec, values_of(filled(MemoryStore(), codec)))
        with CakeCache(tiny, f"pack:{pack}", chunk_size=CHUNK, strategy="load") as cache:
            outcome = run(tiny, prompt(), cache)
            assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS, 0)
        assert difference(outcome, expected("llama", "bfloat16")) == ""


# Another form.


@pytest.mark.parametrize("begin", ["none", "lossless"])
def test_recoding_gives_what_a_cache_would_have_saved(begin: str) -> None:
    other = "lossless" if begin == "none" else "none"
    store, wanted = filled(MemoryStore(), begin), values_of(filled(MemoryStore(), other))
    result = recode(store, no_progress, encode=other == "lossless")
    assert values_of(store) == wanted
    assert (result.changed, result.left, list(result.failed)) == (CHUNKS, 0, [])
    assert result.after == sum(map(len, wanted.values()))
    again = recode(store, no_progress, encode=other == "lossless")
    assert (again.changed, again.left) == (0, CHUNKS)
    assert recode(store, no_progress, encode=begin == "lossless").changed == CHUNKS


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("family", ["gemma3", "lfm2"])
def test_recoding_windows_and_states(family: str) -> None:
    model = family_model(family, torch.bfloat16)
    stores = {}
    for codec in ("none", "lossless"):
        stores[codec] = MemoryStore()
        with CakeCache(model, stores[codec], chunk_size=CHUNK, codec=codec) as cache:
            cache.prefill(FAMILY_IDS, whole=True)
            assert cache.flush(60)
    recode(stores["none"], no_progress, encode=True)
    assert values_of(stores["none"]) == values_of(stores["lossless"])


def test_float32_and_damaged_chunks_are_left() -> None:
    store = MemoryStore()
    with CakeCache(shared_model("llama", "float32"), store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt(), whole=True)
        assert cache.flush(60)
    before = values_of(store)
    assert recode(store, no_progress, encode=True).left == CHUNKS
    assert values_of(store) == before
    store = filled(MemoryStore(), "none")
    key, value = next(iter(values_of(store).items()))
    store.write(key, [value[:-1] + bytes([value[-1] ^ 1])], replace=True)
    result = recode(store, no_progress, encode=True)
    assert (result.changed, len(result.failed)) == (CHUNKS - 1, 1)
    assert not is_encoded(store.read(key) or b"")


def read_beside(store: Store, meanwhile: Callable[[], object]) -> int:
    """How many chunks a cache loads while something is done to its store after each chunk that it has read."""
    tiny = shared_model("llama", "bfloat16")
    with CakeCache(tiny, store, chunk_size=CHUNK, strategy="load", codec="lossless") as cache:
        outcome = run(tiny, prompt(), cache)
        meanwhile()
        assert difference(outcome, expected("llama", "bfloat16")) == ""
        assert cache.report.chunks_failed == 0
        return cache.report.chunks_loaded


def test_a_cache_goes_on_beside_recoding(tmp_path: Path) -> None:
    store = filled(LocalStore(tmp_path), "none")
    for encode in (True, False):
        assert read_beside(store, lambda encode=encode: recode(store, no_progress, encode=encode)) == CHUNKS  # type: ignore[misc]
    assert read_beside(store, lambda: None) == CHUNKS


def test_the_command_recodes(tmp_path: Path) -> None:
    store = filled(LocalStore(tmp_path), "none")
    answer = run_command("recode", tmp_path, "--codec", "lossless")
    assert answer.exit_code == 0, answer.output
    assert f"{CHUNKS} chunks changed" in flat(answer.output)
    assert all(map(is_encoded, values_of(store).values()))
    assert run_command("recode", tmp_path, "--codec", "auto").exit_code != 0
    assert run_command("recode", tmp_path / "nowhere", "--codec", "none").exit_code != 0
