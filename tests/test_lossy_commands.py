"""The commands, packs and engines on stores with chunks of lossy codecs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cake_hf
from cake_hf import CakeCache, LocalStore, MemoryStore, StoreError, export_pack, open_store
from cake_hf.chunks.encoded_header import is_encoded, parse_encoded_header
from cake_hf.cli.inspect_store import take_inventory
from cake_hf.cli.recode import recode
from cake_hf.layers.compat import is_older_than
from cake_hf.packs.importing import refuse_foreign
from cake_hf.serving.support import OLDEST, refuse_lossy
from cake_hf.testing.forgery import forge, one_bit
from commands import LOOKING, flat, look_at, no_progress, run_command, save_model, write_text
from engine_runs import engine_config
from models import CHUNK, CHUNKS, prompt, run, shared_model
from stored import values_of

TEXT_CHUNKS = 6
OPTIONS = ("--chunk-size", CHUNK, "--dtype", "bfloat16", "--no-exact", "--codec", "int4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def warmed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store, and the text that is in it."""
    folder = tmp_path_factory.mktemp("warmed")
    text = write_text(folder / "text.txt", CHUNK * TEXT_CHUNKS + 3)
    answer = run_command("warm", model, text, "--store", folder / "store", *OPTIONS)
    assert answer.exit_code == 0, answer.output
    assert "exact=False, codec='int4'" in flat(answer.output)
    return folder / "store", text


def filled(codec: str, store: Any = None) -> Any:
    store = MemoryStore() if store is None else store
    with CakeCache(shared_model("llama", "bfloat16"), store, chunk_size=CHUNK, codec=codec, exact=False) as cache:
        cache.prefill(prompt(), whole=True)
        assert cache.flush(60)
    return store


@pytest.mark.parametrize("codec", ["near", "int4", "cachegen"])
def test_warming_needs_no_exact(codec: str, model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", CHUNK * 2)
    answer = run_command("warm", model, text, "--store", tmp_path / "store", "--codec", codec)
    assert answer.exit_code != 0
    assert "is lossy: pass exact=False (--no-exact) with it" in flat(answer.output)


@pytest.mark.parametrize("command", LOOKING)
def test_commands_that_look(command: str, warmed: tuple[Path, Path]) -> None:
    look_at(warmed[0], command)


def test_info_tells_stored_and_logical_bytes(warmed: tuple[Path, Path]) -> None:
    values = values_of(LocalStore(warmed[0]))
    key = next(
        key for key, value in values.items() if is_encoded(value) and parse_encoded_header(value)[0].codec == "int4"
    )
    answer = run_command("info", warmed[0], key[:12])
    assert answer.exit_code == 0
    assert "int4: 0." in flat(answer.output)
    assert "BF16" in answer.output
    inventory = take_inventory(LocalStore(warmed[0]), no_progress)
    assert {chunk.codec for chunk in inventory.chunks.values()} >= {"lossless", "int4"}


@pytest.mark.fault(
    "Files",
    "A chunk of a lossy codec is forged, or was made by another model.",
    "`cake-hf verify --recompute` names it.",
)
def test_recompute_compares_what_is_coded(warmed: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    given = ("--recompute", "100%", "--model", model, "--prompt", warmed[1], *OPTIONS)
    answer = run_command("verify", warmed[0], *given)
    assert answer.exit_code == 0, answer.output
    forged = LocalStore(tmp_path / "forged")
    for key, value in values_of(LocalStore(warmed[0])).items():
        forged.write(key, [forge(value, one_bit)])
    assert run_command("verify", forged.root, "--deep").exit_code == 0
    answer = run_command("verify", forged.root, *given)
    assert answer.exit_code == 1
    assert "is not what the model computes" in flat(answer.output)


@pytest.mark.fault("Files", "A bit of a lossy chunk's file changes.", "`cake-hf verify` names it; `--fix` deletes it.")
@pytest.mark.parametrize(("at", "codec"), [(0.05, "int4"), (0.9, "near"), (0.999, "quantspec")])
def test_verify_finds_damage(at: float, codec: str, tmp_path: Path) -> None:
    store = filled(codec, LocalStore(tmp_path))
    key = next(
        key
        for key, value in values_of(store).items()
        if is_encoded(value) and parse_encoded_header(value)[0].codec == codec
    )
    value = bytearray(values_of(store)[key])
    value[int(len(value) * at)] ^= 1
    store.write(key, [value], replace=True)
    answer = run_command("verify", tmp_path, "--deep")
    assert answer.exit_code == 1
    assert key[:8] in answer.output
    assert run_command("verify", tmp_path, "--fix").exit_code in (0, 1)
    assert key not in values_of(store)


# The same KV in another form.


@pytest.mark.parametrize("encode", [True, False])
def test_recoding_leaves_lossy_chunks_and_counts_them(encode: bool) -> None:
    store = filled("int4")
    before = values_of(store)
    result = recode(store, no_progress, encode=encode)
    lossy = {
        key for key, value in before.items() if is_encoded(value) and parse_encoded_header(value)[0].codec == "int4"
    }
    assert (result.lossy, list(result.failed)) == (CHUNKS - 1, [])
    after = values_of(store)
    assert {key: after[key] for key in lossy} == {key: before[key] for key in lossy}
    changed = {key for key in before if before[key] != after[key]}
    assert len(changed) == result.changed == (0 if encode else 1)  # the first chunk, which is exact
    with CakeCache(
        shared_model("llama", "bfloat16"), store, chunk_size=CHUNK, codec="int4", exact=False, strategy="load"
    ) as cache:
        run(shared_model("llama", "bfloat16"), prompt(), cache)
        assert cache.report.chunks_loaded == CHUNKS


def test_the_command_says_how_many_it_left(tmp_path: Path) -> None:
    filled("int4", LocalStore(tmp_path))
    answer = run_command("recode", tmp_path, "--codec", "none")
    assert answer.exit_code == 0, answer.output
    assert f"{CHUNKS - 1} of them of a lossy codec" in flat(answer.output)


@pytest.mark.parametrize("codec", ["auto", "int4", "near"])
def test_recoding_to_a_lossy_codec_is_refused(codec: str, tmp_path: Path) -> None:
    filled("int4", LocalStore(tmp_path))
    answer = run_command("recode", tmp_path, "--codec", codec)
    assert answer.exit_code != 0
    assert "recode stores the same KV in another form" in flat(answer.output)


# Packs.


def test_an_exported_pack_serves_the_same_codec(warmed: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    pack, target = tmp_path / "pack", tmp_path / "pulled"
    answer = run_command("export", warmed[0], pack, "--model", model, "--prompt", warmed[1], *OPTIONS)
    assert answer.exit_code == 0, answer.output
    assert "codec='int4'" in (pack / "README.md").read_text()
    answer = run_command("pull", f"pack:{pack}", target)
    assert answer.exit_code == 0, answer.output
    pulled, stored = values_of(LocalStore(target)), values_of(LocalStore(warmed[0]))
    assert pulled
    assert pulled.items() <= stored.items()
    missing = run_command("export", warmed[0], tmp_path / "none", "--model", model, "--prompt", warmed[1], *OPTIONS[:5])
    assert missing.exit_code != 0


def test_a_pack_of_another_codec_is_refused_with_what_to_do(tmp_path: Path) -> None:
    tiny: Any = shared_model("llama", "bfloat16")
    folder = tmp_path / "pack"
    export_pack(filled("int4"), folder, tiny, prompt(), chunk_size=CHUNK, exact=False, codec="int4")
    for options, loads in (
        ({"codec": "int4"}, True),
        ({"codec": "int8"}, False),
        ({}, False),
        ({"codec": "near"}, False),
    ):
        with CakeCache(tiny, f"pack:{folder}", chunk_size=CHUNK, exact=False, strategy="load", **options) as cache:
            run(tiny, prompt(), cache)
            assert (cache.report.chunks_loaded == CHUNKS) is loads, options
            assert loads or "holds KV of the lossy codec int4; pass codec='int4' and exact=False" in cache.report.reason
    with open_store(f"pack:{folder}") as pack:
        refuse_foreign(pack, tiny)  # type: ignore[arg-type]
        with pytest.raises(StoreError):
            refuse_foreign(pack, shared_model("qwen2", "bfloat16"))  # type: ignore[arg-type]


def test_a_miss_is_explained_by_the_codec() -> None:
    tiny: Any = shared_model("llama", "bfloat16")
    store = filled("int4")
    for options, said in (
        ({"codec": "int8", "exact": False}, "codec int4"),
        ({"exact": False}, "codec int4"),
        ({}, "codec int4"),
    ):
        with CakeCache(tiny, store, chunk_size=CHUNK, save=False, **options) as cache:
            run(tiny, prompt(), cache)
            assert said in cache.report.reason, options
    with CakeCache(tiny, filled("none"), chunk_size=CHUNK, save=False, codec="int4", exact=False) as cache:
        run(tiny, prompt(), cache)
        assert "no lossy codec" in cache.report.reason


# Continuous batching.


@pytest.mark.parametrize("codec", ["near", "int4", "cachegen"])
def test_engines_refuse_lossy_codecs(codec: str) -> None:
    with pytest.raises(
        ValueError, match=f"codec '{codec}' is lossy, and continuous batching computes each chunk from exact"
    ):
        refuse_lossy(codec)
    if is_older_than(OLDEST):
        return
    with (
        pytest.raises(ValueError, match="is lossy, and continuous batching"),
        cake_hf.batching(shared_model("llama"), MemoryStore(), chunk_size=CHUNK, codec=codec, exact=False),
    ):
        pass
    with pytest.raises(ValueError, match="is lossy, and continuous batching"):
        cake_hf.generate_batch(shared_model("llama"), [[1, 2, 3]], store=MemoryStore(), codec=codec, exact=False)


def test_engines_refuse_a_time_to_keep() -> None:
    with pytest.raises(ValueError, match="loads all chunks whole; take CakeCache or"):
        refuse_lossy("lossless", max_ttft=1.0)
    if is_older_than(OLDEST):
        return
    options: dict[str, Any] = {"codec": "lossless", "exact": False, "max_ttft": 1.0}
    with (
        pytest.raises(ValueError, match="loads all chunks whole"),
        cake_hf.batching(shared_model("llama"), MemoryStore(), **options),
    ):
        pass
    with pytest.raises(ValueError, match="loads all chunks whole"):
        cake_hf.generate_batch(shared_model("llama"), [[1, 2, 3]], store=MemoryStore(), **options)


@pytest.mark.parametrize("codec", ["int3", "zip"])
def test_engines_list_the_codecs(codec: str) -> None:
    with pytest.raises(ValueError, match="choose one of none, lossless, auto"):
        refuse_lossy(codec)


def test_the_server_refuses_lossy_codecs(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    if is_older_than(OLDEST):
        pytest.skip("no engine here")
    answer = run_command("serve", model, "--store", tmp_path, "--codec", "int4", "--no-exact")
    assert answer.exit_code != 0
    assert "is lossy, and continuous batching" in flat(answer.output)


def test_an_engine_encodes_losslessly() -> None:
    if is_older_than(OLDEST):
        pytest.skip("no engine here")
    tiny: Any = shared_model("llama", "bfloat16")
    store = MemoryStore()
    options = {"continuous_batching_config": engine_config(), "max_new_tokens": 1}
    cake_hf.generate_batch(tiny, [prompt()[0].tolist()], store=store, chunk_size=CHUNK, codec="lossless", **options)
    chunks = [value for value in values_of(store).values() if is_encoded(value)]
    assert len(chunks) == CHUNKS


def test_plain_caches_are_as_before() -> None:
    """No metadata of exact caches mentions a codec, so that what was stored is found."""
    tiny: Any = shared_model("llama", "bfloat16")
    for options in ({}, {"codec": "lossless"}, {"exact": False}):
        with CakeCache(tiny, MemoryStore(), chunk_size=CHUNK, **options) as cache:
            assert "codec" not in cache._session.bound_model.metadata()
    for codec, version in (("int4", "1"), ("rot4", "2")):
        with CakeCache(tiny, MemoryStore(), chunk_size=CHUNK, codec=codec, exact=False) as cache:
            assert cache._session.bound_model.metadata()["codec"] == {"name": codec, "version": version}
