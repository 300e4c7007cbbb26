"""Packs on the Hub, through its real client, against an endpoint of our own on loopback."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from typer.testing import CliRunner, Result

import family_runs
from cake_hf import (
    CakeCache,
    CorruptChunk,
    Limits,
    LocalStore,
    MemoryStore,
    Store,
    StoreError,
    import_pack,
    push_pack,
    reads_only,
)
from cake_hf.cli.app import app
from cake_hf.model.kv_layout import kv_template
from cake_hf.packs import Pushed
from cake_hf.stores.hub import HubSource, open_hub_pack, parse_hub_name
from cake_hf.stores.manifest import BLOCK_BYTES, CARD, MANIFEST, MAX_MANIFEST_BYTES, chunk_path
from cake_hf.stores.pack import PackStore, open_folder_pack
from cake_hf.testing import ReadOnlyContract
from cake_hf.testing.contract import key_of, read_whole, value_of
from children import command_of
from commands import write_text
from families import family_model, here
from hub_endpoint import TOKEN, File, Hub, Repo, running_hub
from models import CHUNK, CHUNKS, difference, oracle, prompt, run, shared_model
from pack_files import pack_files
from stored import filled_store
from test_cli import WORDS, document, model_folder, warm
from waiting import join_loaders

__all__ = ["document", "model_folder"]  # fixtures that are used here, too

REPO = "org/pack"

# The Hub's client sends files in a way that its own HTTP library discourages.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client takes for the Hub, with a token at hand."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is beyond a test's endpoint
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[None]:
    """The client's connections end with these tests."""
    yield
    close_session()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return shared_model("llama")


@pytest.fixture(scope="module")
def store(model: torch.nn.Module) -> MemoryStore:
    """A store with all chunks of the prompt."""
    return filled_store(model)


@pytest.fixture
def pushed(hub: Hub, model: torch.nn.Module, store: MemoryStore) -> Pushed:
    """Those chunks as a pack on the hub."""
    return push_pack(store, REPO, model, prompt(), chunk_size=CHUNK)


def put(hub: Hub, content: Mapping[str, bytes], repo: str = REPO) -> str:
    """A pack of any bytes on the hub, past the client; gives its commit."""
    files = {}
    for path, raw in pack_files(content).items():
        oid = hashlib.sha256(raw).hexdigest()
        hub.objects[oid] = raw
        files[path] = File(raw) if path == MANIFEST else File(oid=oid)
    return hub.repos.setdefault(repo, Repo()).commit(files)


class TestHubPack(ReadOnlyContract):
    @pytest.fixture(autouse=True)
    def _hub(self, hub: Hub) -> None:
        self.hub = hub

    def make_filled(self, tmp_path: Path, content: Mapping[str, bytes]) -> Store:
        put(self.hub, content)
        return open_hub_pack(f"hf://{REPO}")


# There and back.


@pytest.mark.parametrize("strategy", ["both", "load"])
def test_the_end_of_a_document_is_pushed(hub: Hub, model: torch.nn.Module, strategy: str) -> None:
    """Open on the Hub, and pulled into a store."""
    ids, saved, pulled = prompt(), MemoryStore(), MemoryStore()
    with CakeCache(model, saved, chunk_size=CHUNK) as cache:
        cache.prefill(ids, boundaries=[20])
    there = push_pack(saved, REPO, model, ids, boundaries=[20], chunk_size=CHUNK)
    assert (there.missing, there.manifest.boundaries) == (0, (20, ids.shape[1]))
    assert import_pack(there.url, pulled).tails == 2
    for store in (open_hub_pack(there.url), pulled):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
            report = cache.prefill(ids, boundaries=[20])
            assert strategy == "both" or (report.tails_loaded, report.chunks_computed) == (2, 0)


@pytest.mark.parametrize("strategy", ["both", "load"])
def test_a_pushed_pack_restores_bit_for_bit(pushed: Pushed, model: torch.nn.Module, strategy: str) -> None:
    assert (pushed.missing, len(pushed.manifest.chunks)) == (0, CHUNKS)
    with CakeCache(model, open_hub_pack(pushed.url), chunk_size=CHUNK, strategy=strategy) as cache:
        outcome = run(model, prompt(), cache)
        if strategy == "load":
            assert cache.report.chunks_loaded == CHUNKS
    assert difference(outcome, oracle(model, prompt())) == ""


def test_the_first_use_computes_while_it_downloads(hub: Hub, pushed: Pushed, model: torch.nn.Module) -> None:
    """Two chunks come from the back while the main thread is in its first forward; the third comes too late."""
    gets, third_is_asked_for, over = 0, threading.Event(), threading.Event()

    def hold_the_third(path: str) -> None:
        nonlocal gets
        gets += 1
        if gets == 3:
            third_is_asked_for.set()
        if gets >= 3:
            over.wait(60)

    def in_the_first_forward(*args: Any) -> None:
        assert third_is_asked_for.wait(60)

    opened, limits = open_hub_pack(pushed.url), Limits(loader_threads=1, read_timeout=0.1)
    kv_template(model)  # runs the model once, which must not count
    hub.before_content = hold_the_third
    with CakeCache(model, opened, chunk_size=CHUNK, limits=limits) as cache:
        handle = model.register_forward_pre_hook(reads_only(in_the_first_forward))
        try:
            outcome = run(model, prompt(), cache)
        finally:
            handle.remove()
            over.set()
            join_loaders()
    assert (cache.report.chunks_computed, cache.report.chunks_loaded) == (CHUNKS - 2, 2)
    first = next(span for span in cache.report.timeline if span.actor == "compute")
    loads = [span for span in cache.report.timeline if span.outcome == "loaded"]
    assert all(span.end <= first.end for span in loads)
    assert difference(outcome, oracle(model, prompt())) == ""


def test_only_what_is_wanted_is_asked_for_and_only_in_ranges(hub: Hub, pushed: Pushed, model: torch.nn.Module) -> None:
    hub.requests.clear()
    opened = open_hub_pack(pushed.url)
    assert [request.path for request in hub.requests] == [f"/{REPO}/resolve/{commit_of(pushed)}/{MANIFEST}"]
    assert opened.contains(list(opened.keys())) == [True] * CHUNKS
    assert len(hub.requests) == 1
    with CakeCache(model, opened, chunk_size=CHUNK, strategy="load") as cache:
        run(model, prompt(3 * CHUNK + 5), cache)
        assert cache.report.chunks_loaded == 3
    wanted = {f"bytes=0-{chunk.size - 1}" for chunk in pushed.manifest.chunks}
    assert len(hub.gets()) == 3
    assert {request.range for request in hub.gets()} <= wanted


def test_a_part_of_a_file_is_a_part_of_the_download(hub: Hub) -> None:
    value = value_of(1, 3 * BLOCK_BYTES + 100)
    put(hub, {key_of(1): value})
    opened = open_hub_pack(REPO)
    buffer = bytearray(10)
    assert opened.read_range(key_of(1), [memoryview(buffer)], BLOCK_BYTES + 5)
    assert bytes(buffer) == value[BLOCK_BYTES + 5 : BLOCK_BYTES + 15]
    assert [request.range for request in hub.gets()] == [f"bytes={BLOCK_BYTES}-{2 * BLOCK_BYTES - 1}"]


def test_the_revision_is_pinned_at_opening(hub: Hub, pushed: Pushed, model: torch.nn.Module) -> None:
    opened = open_hub_pack(f"hf://{REPO}")
    assert repr(opened) == f"PackStore('hf://{REPO}@{commit_of(pushed)}')"
    put(hub, {key_of(1): value_of(1)})  # somebody pushes another pack
    assert list(open_hub_pack(f"hf://{REPO}@main").keys()) == [key_of(1)]
    hub.requests.clear()
    with CakeCache(model, opened, chunk_size=CHUNK, strategy="load") as cache:
        run(model, prompt(), cache)
        assert cache.report.chunks_loaded == CHUNKS
    asked = {request.path.split("/resolve/")[1][:40] for request in hub.requests if request.server == "endpoint"}
    assert asked == {commit_of(pushed)}


def test_a_tag_may_have_a_slash(hub: Hub, pushed: Pushed) -> None:
    hub.repos[REPO].refs["refs/pr/1"] = commit_of(pushed)
    put(hub, {key_of(1): value_of(1)})
    opened = open_hub_pack(f"hf://{REPO}@refs/pr/1")
    assert isinstance(opened.source, HubSource)
    assert opened.source.commit == commit_of(pushed)


def test_pulling_gives_the_store_that_was_pushed(hub: Hub, pushed: Pushed, tmp_path: Path, store: MemoryStore) -> None:
    imported = import_pack(pushed.url, tmp_path / "store")
    assert imported.chunks == CHUNKS
    local = LocalStore(tmp_path / "store")
    assert {key: read_whole(local, key) for key in local.keys()} == {  # noqa: SIM118 (a store is no dict)
        key: read_whole(store, key)
        for key in store.keys()  # noqa: SIM118
    }


@pytest.mark.parametrize("family", here("qwen3_next", "falcon_h1", "lfm2"))
def test_snapshots_of_recurrent_states_go_along(hub: Hub, tmp_path: Path, family: str) -> None:
    model, ids = family_model(family), family_runs.IDS
    store = filled_store(model, ids)
    pushed = push_pack(store, REPO, model, ids, chunk_size=CHUNK)
    (state,) = pushed.manifest.states
    with CakeCache(model, open_hub_pack(pushed.url), chunk_size=CHUNK, strategy="load") as cache:
        family_runs.check(family, family_runs.generate(model, cache), "from the hub")
        assert (cache.report.chunks_loaded, cache.report.states_loaded) == (family_runs.CHUNKS, 1)
    result = cake("pull", REPO, tmp_path / "store")
    assert f"pulled {family_runs.CHUNKS} chunks and 1 snapshot (" in result.output
    assert f"wrote {family_runs.CHUNKS} chunks and 1 snapshot, " in result.output
    assert "; 0 were there already" in result.output
    assert sorted(LocalStore(tmp_path / "store").keys()) == sorted(store.keys())
    assert f"{family_runs.CHUNKS + 1} were there already" in cake("pull", REPO, tmp_path / "store").output
    push_pack(store, REPO, model, ids[:, :CHUNK], chunk_size=CHUNK)
    assert chunk_path(state.key) not in hub.files(REPO)


def test_the_hubs_own_client_can_download_a_pack(hub: Hub, pushed: Pushed, tmp_path: Path, store: MemoryStore) -> None:
    """So the endpoint of these tests is one that the client takes for the Hub, and a copied repository is a pack."""
    for path in [MANIFEST, CARD, *(chunk_path(chunk.key) for chunk in pushed.manifest.chunks)]:
        huggingface_hub.hf_hub_download(REPO, path, local_dir=tmp_path, cache_dir=tmp_path / "cache")
    opened = open_folder_pack(tmp_path)
    assert all(read_whole(opened, key) == read_whole(store, key) for key in opened.keys())  # noqa: SIM118


# What a hub may do wrong.


def test_a_corrupted_file_is_computed_instead(hub: Hub, pushed: Pushed, model: torch.nn.Module) -> None:
    path = chunk_path(pushed.manifest.chunks[4].key)
    raw = bytearray(hub.file(REPO, path))
    raw[9000] ^= 1
    hub.replace(REPO, path, bytes(raw))
    with CakeCache(model, open_hub_pack(pushed.url), chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS - 1, 1)
    assert difference(outcome, oracle(model, prompt())) == ""


def test_the_hubs_own_client_takes_the_corrupted_file_for_good(hub: Hub, pushed: Pushed, tmp_path: Path) -> None:
    """Why its cache is not used, and the negative control of the test above."""
    path = chunk_path(pushed.manifest.chunks[4].key)
    raw = bytearray(hub.file(REPO, path))
    raw[9000] ^= 1
    hub.replace(REPO, path, bytes(raw))
    file = huggingface_hub.hf_hub_download(REPO, path, local_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert Path(file).read_bytes() == bytes(raw)


def test_a_line_that_breaks_is_taken_up_where_it_broke(hub: Hub) -> None:
    put(hub, {key_of(1): value_of(1, 300_000)})
    opened = open_hub_pack(REPO)
    hub.cut_after = 200_000
    assert read_whole(opened, key_of(1)) == value_of(1, 300_000)
    first, second = (request.range for request in hub.gets())
    assert first == "bytes=0-299999"
    start = int(re.fullmatch(r"bytes=(\d+)-299999", second)[1])  # type: ignore[index]
    assert 0 < start <= 200_000


def test_a_line_that_breaks_twice_is_a_fault(hub: Hub) -> None:
    put(hub, {key_of(1): value_of(1, 300_000)})
    opened = open_hub_pack(REPO)

    def cut_always(path: str) -> None:
        hub.cut_after = 1000

    hub.before_content = cut_always
    with pytest.raises(StoreError, match="check the network and HF_ENDPOINT"):
        opened.read(key_of(1))
    assert len(hub.gets()) == 2


@pytest.mark.parametrize("status", [404, 403, 429, 500, 503])
def test_a_content_server_that_refuses_is_a_fault(
    hub: Hub, pushed: Pushed, model: torch.nn.Module, status: int
) -> None:
    opened = open_hub_pack(pushed.url)
    hub.status = status
    with pytest.raises(StoreError, match=f"{status}"):
        opened.read(pushed.manifest.chunks[0].key)
    with CakeCache(model, opened, chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (0, CHUNKS)
    assert difference(outcome, oracle(model, prompt())) == ""


def test_no_byte_more_than_asked_for_is_taken(hub: Hub) -> None:
    put(hub, {key_of(1): value_of(1)})
    hub.replace(REPO, chunk_path(key_of(1)), value_of(1) + b"more" * 100_000)
    opened = open_hub_pack(REPO)
    assert read_whole(opened, key_of(1)) == value_of(1)  # the range ends where it should
    hub.ignores_ranges = True
    with pytest.raises(CorruptChunk, match="more bytes"):
        opened.read(key_of(1))


def test_a_server_without_ranges_can_be_read_whole_only(hub: Hub) -> None:
    put(hub, {key_of(1): value_of(1, 2 * BLOCK_BYTES)})
    hub.ignores_ranges = True
    opened = open_hub_pack(REPO)
    assert read_whole(opened, key_of(1)) == value_of(1, 2 * BLOCK_BYTES)
    with pytest.raises(StoreError, match="did not send the range"):
        opened.read_range(key_of(1), [memoryview(bytearray(10))], BLOCK_BYTES)


def test_a_shorter_file_is_corrupt(hub: Hub) -> None:
    put(hub, {key_of(1): value_of(1)})
    hub.replace(REPO, chunk_path(key_of(1)), value_of(1)[:500])
    with pytest.raises(CorruptChunk, match="cut short"):
        open_hub_pack(REPO).read(key_of(1))


def test_a_manifest_without_end_is_not_read_to_its_end(hub: Hub) -> None:
    put(hub, {key_of(1): value_of(1)})
    hub.replace(REPO, MANIFEST, b"[" + b" " * (MAX_MANIFEST_BYTES + 10**6))
    source = HubSource(REPO)
    assert MAX_MANIFEST_BYTES < len(source.manifest(MAX_MANIFEST_BYTES)) <= MAX_MANIFEST_BYTES + 2**20
    with pytest.raises(StoreError, match="larger than any"):
        PackStore(source)


# What a person may do wrong.


def test_what_cannot_be_opened_is_said_in_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, {key_of(1): value_of(1)})
    hub.repos["org/empty"] = Repo()
    hub.repos["org/empty"].commit({CARD: File(b"nothing")})
    hub.repos["org/hidden"] = Repo(private=True)
    hub.repos["org/gated"] = Repo(gated=True)
    for name in ("org/hidden", "org/gated"):
        hub.repos[name].commit(hub.files(REPO))

    def sentence(url: str) -> str:
        with pytest.raises(StoreError) as caught:
            open_hub_pack(url)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no repository org/nothing" in sentence("hf://org/nothing")
    assert "no revision v9" in sentence(f"hf://{REPO}@v9")
    assert "no revision" in sentence(f"hf://{REPO}@{'0' * 40}")
    assert "no whole pack" in sentence("hf://org/empty")
    assert "gated; ask for access" in sentence("hf://org/gated")
    assert "write it like hf://org/pack" in sentence("hf://pack")
    assert "no name of a repository" in sentence("hf://org/..")
    assert list(open_hub_pack("hf://org/hidden").keys()) == [key_of(1)]
    monkeypatch.delenv("HF_TOKEN")
    hidden = sentence("hf://org/hidden")
    assert "you may not see it" in hidden
    assert "HF_TOKEN" in hidden
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in sentence(f"hf://{REPO}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network and HF_ENDPOINT" in sentence(f"hf://{REPO}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "cake-hf[hub]"' in sentence(f"hf://{REPO}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/pack", ("org/pack", "main")),
        ("org/pack", ("org/pack", "main")),
        ("hf://o-r.g_/p-a.c_k@v1.0", ("o-r.g_/p-a.c_k", "v1.0")),
        ("hf://org/pack@refs/pr/1", ("org/pack", "refs/pr/1")),
    ],
)
def test_names_of_packs(text: str, expected: tuple[str, str]) -> None:
    assert parse_hub_name(text) == expected


@pytest.mark.parametrize(
    "text", ["", "hf://", "pack", "hf://a/b/c", "hf://a/b@", "hf://a/b@c d", "s3://a/b", "hf://a/b@c@d"]
)
def test_a_malformed_pack_name_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="names no pack"):
        parse_hub_name(text)


def test_the_token_goes_to_the_endpoint_only(hub: Hub, pushed: Pushed) -> None:
    opened = open_hub_pack(pushed.url)
    opened.read(pushed.manifest.chunks[0].key)
    assert all(request.authorized for request in hub.requests if "/resolve/" in request.path)
    assert hub.gets()
    assert not any(request.authorized for request in hub.requests if request.server == "content")


# Pushing.


def test_a_push_is_one_commit_of_a_whole_pack(hub: Hub, pushed: Pushed) -> None:
    files = hub.files(REPO, commit_of(pushed))
    chunks = {chunk_path(chunk.key) for chunk in pushed.manifest.chunks}
    assert set(files) == {".gitattributes", MANIFEST, CARD, *chunks}
    assert len(hub.repos[REPO].commits) == 2  # the one that made the repository, and ours
    assert hub.file(REPO, MANIFEST) == pushed.manifest.to_json()
    assert f'CakeCache(model, "hf://{REPO}", chunk_size={CHUNK})' in hub.file(REPO, CARD).decode()


def test_an_older_pack_is_replaced(hub: Hub, pushed: Pushed, model: torch.nn.Module, store: MemoryStore) -> None:
    uploads = len([request for request in hub.requests if request.method == "PUT"])
    assert uploads == CHUNKS
    again = push_pack(store, f"hf://{REPO}", model, prompt(3 * CHUNK), chunk_size=CHUNK)
    assert len([request for request in hub.requests if request.method == "PUT"]) == uploads  # nothing is sent twice
    names = {path for path in hub.files(REPO) if path.endswith(".safetensors")}
    assert names == {chunk_path(chunk.key) for chunk in again.manifest.chunks}
    assert len(names) == 3
    assert len(list(open_hub_pack(pushed.url).keys())) == CHUNKS  # the older commit is as it was


def test_what_is_not_in_the_store_is_said(hub: Hub, model: torch.nn.Module, store: MemoryStore) -> None:
    longer = torch.cat([prompt(CHUNK * CHUNKS), prompt(2 * CHUNK, seed=3)], dim=1)
    result = push_pack(store, REPO, model, longer, chunk_size=CHUNK)
    assert (result.missing, len(result.manifest.chunks)) == (2, CHUNKS)


def test_somebody_elses_repository_is_left_alone(hub: Hub, model: torch.nn.Module, store: MemoryStore) -> None:
    hub.repos["org/model"] = Repo()
    before = hub.repos["org/model"].commit({CARD: File(b"my model"), "model.safetensors": File(b"weights")})
    with pytest.raises(StoreError, match="something else than a pack"):
        push_pack(store, "org/model", model, prompt(), chunk_size=CHUNK)
    assert hub.repos["org/model"].refs["main"] == before
    assert not hub.objects


def test_a_push_that_another_one_has_overtaken_is_refused(
    hub: Hub, pushed: Pushed, model: torch.nn.Module, store: MemoryStore
) -> None:
    def somebody_pushes(done: int, total: int) -> None:
        if done == total:
            put(hub, {key_of(1): value_of(1)})

    with pytest.raises(StoreError, match="status 412"):
        push_pack(store, REPO, model, prompt(), chunk_size=CHUNK, progress=somebody_pushes)
    assert list(open_hub_pack(REPO).keys()) == [key_of(1)]


def test_what_cannot_be_pushed_is_said_in_one_sentence(
    hub: Hub, model: torch.nn.Module, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(repo: str = REPO, **options: Any) -> str:
        with pytest.raises(StoreError) as caught:
            push_pack(store, repo, model, prompt(), **{"chunk_size": CHUNK, **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--allow-salted" in sentence(salt="tenant")
    assert "none of this prompt's chunks" in sentence(chunk_size=32)
    assert "main branch" in sentence(f"{REPO}@v1")
    assert hub.requests == []  # nothing of that was anybody's business
    hub.status = 500
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    assert "status 500" in sentence()
    hub.status = None
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "status 401" in sentence("org/other") or "you may not see it" in sentence("org/other")


# The command line.


def cake(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_push_and_pull_on_the_command_line(hub: Hub, tmp_path: Path, model_folder: Path, document: Path) -> None:
    warmed = tmp_path / "store"
    assert warm(cake, model_folder, document, warmed).exit_code == 0
    options = ("--prompt", document, "--model", model_folder, "--chunk-size", CHUNK)
    result = cake("push", warmed, REPO, *options, "--private")
    assert result.exit_code == 0, result.output
    assert hub.repos[REPO].private
    url = f"hf://{REPO}@{hub.repos[REPO].refs['main']}"
    chunks = WORDS // CHUNK
    assert f"pushed {chunks} chunks" in result.output
    assert "warm and push with --no-exact" in result.output
    assert f"CakeCache(model, '{url}', chunk_size={CHUNK})" in result.output
    pulled = tmp_path / "pulled"
    result = cake("pull", REPO, pulled, "--model", model_folder)
    assert result.exit_code == 0, result.output
    assert f"wrote {chunks} chunks" in result.output
    assert url in result.output
    assert sorted(LocalStore(pulled).keys()) == sorted(LocalStore(warmed).keys())
    result = cake("pull", url, pulled)
    assert "wrote 0 chunks" in result.output
    assert f"{chunks} were there already" in result.output


def test_the_command_line_says_what_is_wrong(hub: Hub, tmp_path: Path, model_folder: Path, document: Path) -> None:
    warmed = tmp_path / "store"
    assert warm(cake, model_folder, document, warmed, "--salt", "s").exit_code == 0
    options = ("--prompt", document, "--model", model_folder, "--chunk-size", CHUNK)
    for arguments, words in [
        (("push", warmed, REPO, *options), "none of this prompt's chunks"),
        (("push", warmed, REPO, *options, "--salt", "s"), "--allow-salted"),
        (("push", tmp_path / "nothing", REPO, *options), "There is no store"),
        (("pull", "org/nothing", tmp_path / "new"), "no repository org/nothing"),
        (("pull", tmp_path, tmp_path / "new"), "is no pack"),
        (("pull", "nothing", tmp_path / "new"), "names no pack"),
    ]:
        result = cake(*arguments)
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert "Traceback" not in result.output
    assert not hub.repos
    result = cake("push", warmed, REPO, *options, "--salt", "s", "--allow-salted")
    assert result.exit_code == 0, result.output
    assert "salt=..." in result.output
    other = write_text(tmp_path / "other.txt", WORDS, seed=4)
    longer = tmp_path / "longer.txt"
    longer.write_text(f"{document.read_text()} {other.read_text()}")
    result = cake("push", warmed, REPO, "--prompt", longer, *options[2:], "--salt", "s", "--allow-salted")
    assert "Not in the store, and so not in the pack: " in result.output


def test_endpoint_and_token_come_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, where nothing is patched: only what a user would set is set."""
    put(hub, {key_of(1): value_of(1)})
    hub.repos[REPO].private = True
    script = """
from cake_hf.errors import StoreError
from cake_hf.stores.hub import open_hub_pack
pack = open_hub_pack("hf://org/pack")
assert [len(pack.read(key)) for key in pack.keys()] == [1000]
del os.environ["HF_TOKEN"]
try:
    open_hub_pack("hf://org/pack")
except StoreError as error:
    assert "you may not see it" in str(error)
else:
    raise AssertionError("a private repository was opened without a token")
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command_of(script, bare=False), env=environment, check=True, timeout=280)


def commit_of(pushed: Pushed) -> str:
    return pushed.url.partition("@")[2]
