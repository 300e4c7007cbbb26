"""What was stored of a document's end travels: packs, their commands and checks know the tails at declared boundaries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, MemoryStore, Store, StoreError, export_pack, import_pack
from cake_hf.cli.recompute import RecomputeJob, WarmedOptions, recompute_prompt
from cake_hf.stores import LocalStore
from cake_hf.stores.manifest import CARD, parse_manifest
from cake_hf.stores.pack import open_folder_pack
from cake_hf.testing.forgery import forge
from commands import flat, run_command, save_model, write_text
from cut_runs import in_pieces
from families import here
from family_runs import difference, generate
from models import CHUNK, prompt, shared_model
from pack_files import manifest_of
from stored import keys_in_order
from test_cuts import any_model

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these

MODELS = ["llama bfloat16", *here("gemma3", "qwen3_next")]


def saved(model: Any, ids: torch.Tensor, boundaries: Sequence[int] = (), **options: Any) -> MemoryStore:
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(ids, boundaries=boundaries, **options)
    return store


def expect_restored(model: Any, store: Store, ids: torch.Tensor, boundaries: Sequence[int] = ()) -> None:
    """A question on the document: nothing of this is computed, and what comes is what the same pieces give."""
    whole = torch.cat([ids, prompt(9, seed=6)], dim=1)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(ids, boundaries=boundaries)
        assert (report.chunks_computed, report.tails_computed, report.chunks_missed) == (0, 0, 0)
        asked = generate(model, cache, whole)
    assert difference(asked, in_pieces(model, whole, [*boundaries, ids.shape[1]])) == ""


@pytest.mark.fault(
    "KV",
    "A document whose end was stored, too, is exported, pushed or pulled.",
    "Its tail is in the pack as its chunks are: a question on it computes nothing of the document, bit for bit.",
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("tokens", "boundaries"),
    [(3 * CHUNK + 7, ()), (CHUNK + 1, ()), (5, ()), (2 * CHUNK, ()), (3 * CHUNK + 7, (20,)), (70, (3, 16, 17, 18, 40))],
)
def test_a_pack_carries_tails_to_another_store(
    tmp_path: Path, name: str, tokens: int, boundaries: tuple[int, ...]
) -> None:
    model, ids = any_model(name), prompt(tokens, seed=5)
    store = saved(model, ids, boundaries)
    manifest = export_pack(store, tmp_path / "pack", model, ids, boundaries=boundaries, chunk_size=CHUNK)
    assert manifest.tokens == (0, tokens)
    assert parse_manifest((tmp_path / "pack" / "cake_pack.json").read_bytes()) == manifest
    expect_restored(model, open_folder_pack(tmp_path / "pack"), ids, boundaries)
    target = MemoryStore()
    imported = import_pack(tmp_path / "pack", target, model=model)
    assert imported.tails == len(manifest.tails)
    assert imported.chunks == len(manifest.chunks)
    expect_restored(model, target, ids, boundaries)


def test_a_conversation_travels(tmp_path: Path) -> None:
    """The reply's tokens, one by one, with the cuts that the cache tells."""
    model, ids, store = shared_model("llama"), prompt(CHUNK + 5, seed=5), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        said = generate(model, cache, ids, max_new_tokens=CHUNK + 4).tokens
        boundaries = cache.end_turn()
    known = said[:, : boundaries[-1]]
    manifest = export_pack(store, tmp_path / "pack", model, known, boundaries=boundaries, chunk_size=CHUNK)
    assert list(manifest.boundaries) == boundaries
    target = MemoryStore()
    import_pack(tmp_path / "pack", target)
    with CakeCache(model, target, chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(known, boundaries=boundaries)
        assert (report.chunks_computed, report.tails_computed) == (0, 0)
    card = (tmp_path / "pack" / CARD).read_text()
    assert "cache.prefill(ids[:, :" in card
    assert "boundaries=boundaries)  # those of cake_pack.json" in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_an_end_that_was_not_declared_is_not_missed(tmp_path: Path) -> None:
    model, ids = shared_model("llama"), prompt(2 * CHUNK + 3, seed=5)
    store = saved(model, ids, whole=True)
    manifest = export_pack(store, tmp_path / "pack", model, ids, chunk_size=CHUNK)
    assert (manifest.tokens, manifest.boundaries) == ((0, 2 * CHUNK), ())
    told = json.loads(manifest.to_json())
    assert told["version"] == "1"
    assert "boundaries" not in told
    assert "prefill" not in (tmp_path / "pack" / CARD).read_text()


def test_a_tail_that_is_gone_is_left_out_and_what_is_behind_it_is_not(tmp_path: Path) -> None:
    model, ids = shared_model("llama"), prompt(20 + CHUNK + 3, seed=5)
    store = saved(model, ids, (20,))
    gone = keys_in_order(store)[1]
    store.delete(gone)
    manifest = export_pack(store, tmp_path / "pack", model, ids, boundaries=(20,), chunk_size=CHUNK)
    assert [chunk.index for chunk in manifest.chunks] == [0, 2, 3]
    assert manifest.boundaries == (20, ids.shape[1])
    with CakeCache(model, open_folder_pack(tmp_path / "pack"), chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(ids, boundaries=(20,))
        assert (report.chunks_loaded, report.tails_loaded, report.tails_computed) == (2, 1, 1)


@pytest.mark.parametrize("boundaries", [(0,), (-3,), (999,), (20, 40)])
def test_boundaries_of_another_prompt_are_one_sentence(tmp_path: Path, boundaries: tuple[int, ...]) -> None:
    model, ids = shared_model("llama"), prompt(2 * CHUNK + 3, seed=5)
    with pytest.raises(ValueError, match=r"^Boundary .* is outside the prompt, which has 35 tokens; .*\.$"):
        export_pack(saved(model, ids), tmp_path / "pack", model, ids, boundaries=boundaries, chunk_size=CHUNK)
    with pytest.raises(TypeError, match="whole numbers"):
        export_pack(saved(model, ids), tmp_path / "pack", model, ids, boundaries=["a"], chunk_size=CHUNK)  # type: ignore[list-item]
    assert not (tmp_path / "pack").exists()


# What a stranger may have written.


def told(**changes: Any) -> bytes:
    """A manifest of 70 tokens, cut at some places, with other fields."""
    keys = {f"{number:040x}": b"x" * 9 for number in range(6)}
    fields = json.loads(manifest_of(keys, boundaries=(20, 27), chunk_size=16).to_json())
    return json.dumps({**fields, **changes}).encode()


def test_the_manifest_of_these_tests_is_good() -> None:
    manifest = parse_manifest(told())
    assert manifest.tokens == (0, 27 + 3 * 16)
    assert [manifest.block(index).tokens for index in range(6)] == [16, 4, 7, 16, 16, 16]
    assert len(manifest.tails) == 2


@pytest.mark.fault(
    "Files",
    "The manifest of a pack names boundaries outside its prompt, in no order, or millions of them.",
    "The pack is refused in one sentence, before anything is counted through.",
)
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"boundaries": [20, 200]}, "a boundary is outside the prompt, of which it has 84 tokens"),
        ({"boundaries": [20, 2**61]}, "its boundaries make more than 262,144 blocks"),
        ({"boundaries": [20, 10**400]}, "its boundaries make more than 262,144 blocks"),
        ({"boundaries": list(range(1, 2**18 + 2))}, "'boundaries' is missing, unknown or out of range"),
        ({"boundaries": [27, 20]}, "its boundaries do not increase"),
        ({"boundaries": [20, 20]}, "its boundaries do not increase"),
        ({"boundaries": [0, 20]}, "a boundary is no number of tokens"),
        ({"boundaries": [-4, 20]}, "a boundary is no number of tokens"),
        ({"boundaries": [True, 20]}, "a boundary is no number of tokens"),
        ({"boundaries": ["20"]}, "a boundary is no number of tokens"),
        ({"boundaries": [20.5]}, "a boundary is no number of tokens"),
        ({"boundaries": [16, 27]}, "one of its boundaries ends no tail"),
        ({"boundaries": []}, "'boundaries' is missing, unknown or out of range"),
        ({"boundaries": "20"}, "'boundaries' is missing, unknown or out of range"),
        ({"boundaries": [20, 28]}, "its tokens are not those of its chunks"),
        ({"tokens": [0, 70]}, "its tokens are not those of its chunks"),
        ({"version": "2"}, "'states' is missing, unknown or out of range"),
        ({"version": "1"}, "its tokens are not those of its chunks"),
        ({"version": "1", "tokens": [0, 96]}, "'boundaries' is missing, unknown or out of range"),
        ({"version": "4"}, "another version of the format"),
        ({"states": []}, "'states' is missing, unknown or out of range"),
    ],
)
def test_boundaries_that_make_no_sense(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StoreError) as raised:
        parse_manifest(told(**changes))
    assert complaint in str(raised.value)
    assert str(raised.value).count(". ") == 0


# The checks.


@pytest.mark.fault(
    "KV",
    "A stored tail is well-formed and is not what the model computes.",
    "`cake-hf verify --recompute` finds it, as it does with chunks.",
)
@pytest.mark.parametrize("name", ["llama float32", *here("qwen3_next")])
@pytest.mark.parametrize(("tokens", "boundaries"), [(2 * CHUNK + 7, ()), (5, ()), (50, (20, 21))])
def test_tails_are_recomputed(name: str, tokens: int, boundaries: tuple[int, ...]) -> None:
    model, ids = any_model(name), prompt(tokens, seed=5)
    store = saved(model, ids, boundaries)
    count = len(list(store.keys()))
    job = RecomputeJob("", [], 1.0, warmed=WarmedOptions(chunk_size=CHUNK, boundary=boundaries))
    result = recompute_prompt(job, store, model, ids, "a prompt")
    assert (result.sampled, result.stored, result.bad) == (count, count, [])
    lie = keys_in_order(store)[-1]
    store.write(lie, [forge(bytes(store.read(lie) or b""))], replace=True)
    assert [chunk.key for chunk in recompute_prompt(job, store, model, ids, "a prompt").bad] == [lie]


# The commands.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    found = save_model(tmp_path_factory.mktemp("models") / "tiny")
    template = "{% for message in messages %}w9 w8 {{ message['content'] }} w7 {% endfor %}"
    (found / "chat_template.jinja").write_text(template)
    return found


WAYS = [
    (("--prompt",), ()),
    (("--chat",), ("--chat",)),
    (("--prompt", "--boundary", "20", "--boundary", "21"), ("--boundary", "20", "--boundary", "21")),
    (("--prompt", "--tokens", "10"), ("--tokens", "10")),
]


@pytest.mark.parametrize(("warmed", "named"), WAYS, ids=lambda way: " ".join(way))
def test_commands_take_a_document_as_it_was_warmed(
    tmp_path: Path, folder: Path, warmed: tuple[str, ...], named: tuple[str, ...]
) -> None:
    text, size = write_text(tmp_path / "text.txt", 2 * CHUNK + 7), ("--chunk-size", CHUNK)
    assert run_command("warm", folder, text, "--store", tmp_path / "kv", *size, *warmed).exit_code == 0
    stored = sorted(LocalStore(tmp_path / "kv").keys())
    how = ("--prompt", text, "--model", folder, *size, *named)
    exported = run_command("export", tmp_path / "kv", tmp_path / "pack", *how)
    assert exported.exit_code == 0, exported.output
    assert "tail" in exported.stdout
    assert "not in the" not in exported.stderr
    assert "cache.prefill(ids[:, :" in exported.stdout
    pulled = run_command("pull", f"pack:{tmp_path / 'pack'}", tmp_path / "pulled")
    assert "tail" in pulled.stdout
    assert sorted(LocalStore(tmp_path / "pulled").keys()) == stored
    checked = run_command("verify", tmp_path / "pulled", "--recompute", "100%", *how)
    assert f"{len(stored)} chunk{'s' * (len(stored) > 1)} of {len(stored)} computed again" in flat(checked.stdout)
    pinned = run_command("pin", tmp_path / "pulled", *how, "--for", "1h")
    assert f"{len(stored)} chunk{'s' * (len(stored) > 1)} pinned" in pinned.stdout
    found = run_command("why", tmp_path / "pulled", *how)
    assert found.exit_code == 0, found.output
    removed = run_command("rm", tmp_path / "pulled", *how)
    assert removed.exit_code == 0, removed.output
    assert list(LocalStore(tmp_path / "pulled").keys()) == []


def test_export_says_what_was_not_kept(tmp_path: Path, folder: Path) -> None:
    text, size = write_text(tmp_path / "text.txt", 2 * CHUNK + 7), ("--chunk-size", CHUNK)
    run_command("warm", folder, text, "--store", tmp_path / "kv", *size)
    how = ("--prompt", text, "--model", folder, *size)
    exported = run_command("export", tmp_path / "kv", tmp_path / "pack", *how)
    assert "exported 2 chunks (" in exported.stdout
    assert "The last 7 tokens, which fill no chunk, are not in the store" in exported.stderr


@pytest.mark.parametrize("command", ["warm", "export", "push", "verify", "rm", "pin", "why"])
@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("--boundary", 0), "Boundary 0 is outside the prompt, which has 39 tokens"),
        (("--boundary", 40), "Boundary 40 is outside the prompt, which has 39 tokens"),
        (("--tokens", 20, "--boundary", 21), "Boundary 21 is outside the prompt, which has 20 tokens"),
        (("--system", "system.txt"), "--system is for --chat"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_boundaries_and_system_prompts_that_do_not_fit_are_one_sentence(
    tmp_path: Path, folder: Path, command: str, given: tuple[Any, ...], complaint: str
) -> None:
    text, store = write_text(tmp_path / "text.txt", 2 * CHUNK + 7), LocalStore(tmp_path / "kv")
    store.write("ab" * 20, [b"something"])
    arguments: dict[str, tuple[Any, ...]] = {
        "warm": ("warm", folder, text, "--store", store.root),
        "export": ("export", store.root, tmp_path / "pack"),
        "push": ("push", store.root, "org/pack"),
        "verify": ("verify", store.root, "--recompute", "100%"),
        "rm": ("rm", store.root),
        "pin": ("pin", store.root, "--for", "1h"),
        "why": ("why", store.root),
    }
    document = () if command == "warm" else ("--prompt", text, "--model", folder)
    result = run_command(*arguments[command], *document, "--chunk-size", CHUNK, *given)
    assert result.exit_code == 2, result.output
    assert complaint in flat(result.stderr)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "pack").exists()
