"""From a URL to a store, without and with the client library that it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cake_hf import CakeCache, Limits, StoreError
from cake_hf.stores import LocalStore, MemoryStore, TierStore, open_store, opening
from cake_hf.stores.object import ObjectStore
from cake_hf.stores.redis import RedisStore
from cake_hf.testing.contract import key_of
from children import command_of
from models import shared_model


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("s3://bucket/prefix", ObjectStore),
        ("gs://bucket/prefix", ObjectStore),
        ("az://container/prefix", ObjectStore),
        ("redis://localhost:6379/0?ttl=86400", RedisStore),
        ("rediss://localhost:6379/0", RedisStore),
        ("redis+unix:///run/redis.sock", RedisStore),
    ],
)
def test_a_scheme_opens_its_store(url: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    with open_store(url) as store:
        assert isinstance(store, kind)


@pytest.mark.parametrize(
    ("url", "library", "module", "message"),
    [
        (
            "redis://host",
            "redis",
            "cake_hf.stores.redis",
            'Stores at redis:// need the package redis: pip install "cake-hf',
        ),
        ("s3://bucket", "obstore", "cake_hf.stores.object", "Stores at s3:// need the package obstore: pip install"),
    ],
)
def test_a_missing_client_library_is_named_with_its_extra(
    url: str, library: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == library or name.startswith(module):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(library), *sys.meta_path])
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"{opening.REMOTE_KINDS[url.partition(':')[0]].install}")


class Without:
    """An import system without one library."""

    def __init__(self, library: str) -> None:
        self.library = library

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self.library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_fault_of_our_own_is_not_called_a_missing_library() -> None:
    kind = opening.RemoteKind("x://", "cake_hf.stores.nothing:Store", "x")
    with pytest.raises(ModuleNotFoundError):
        kind.open("x://host")


def test_an_unknown_scheme_lists_the_known_ones_and_what_to_install() -> None:
    with pytest.raises(StoreError) as caught:
        open_store("gopher://somebody:secret@x")
    message = str(caught.value)
    assert message.startswith(
        "Unknown store URL 'gopher://x'; known are a directory path, file:///path, memory:4GB; s3://"
    )
    for kind in opening.REMOTE_KINDS.values():
        assert kind.example in message
        assert kind.install in message
    assert "secret" not in message


def test_client_libraries_are_not_imported_before_they_are_needed() -> None:
    """In a process of its own, past the package's face, which would bring in transformers and take seconds."""
    script = """
from cake_hf.stores import open_store
open_store("memory:")
assert not {"obstore", "redis", "botocore", "numpy"} & set(sys.modules)
open_store("redis://localhost")
assert "redis" in sys.modules and "obstore" not in sys.modules
"""
    subprocess.run(command_of(script, bare=False), check=True, timeout=280)


def test_a_directory_with_a_budget(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}?budget=3KB&eviction=front-first")
    assert isinstance(store, LocalStore)
    for number in range(4):
        store.write(key_of(number), [bytes(1000)])
    assert len(list(store.keys())) == 3


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("budget=much", "'much' is not a size"),
        ("budget=0GB", "room for nothing"),
        ("eviction=mru", "mru"),
        ("ttl=5", "no option 'ttl'; known are budget and eviction"),
    ],
)
def test_options_of_a_directory_that_make_no_sense(query: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=message):
        open_store(f"file://{tmp_path}?{query}")


def test_a_list_is_tiers_nearest_first(tmp_path: Path) -> None:
    with open_store(["memory:1MB", str(tmp_path / "near"), [tmp_path / "far", MemoryStore()]]) as store:
        assert isinstance(store, TierStore)
        store.write(key_of(1), [b"value"])
        assert store.flush(60)
        assert LocalStore(tmp_path / "near").contains([key_of(1)]) == [True]
        assert store.read(key_of(1)) == b"value"
    with pytest.raises(StoreError, match="The list of stores is empty"):
        open_store([])
    with pytest.raises(StoreError, match="not int"):
        open_store(7)  # type: ignore[arg-type]


def test_a_pack_among_tiers_is_never_written() -> None:
    class Sealed(MemoryStore):
        read_only = True

        def write(self, *_: object, **__: object) -> bool:
            raise StoreError("nothing can be written here")

    sealed, open_one = Sealed(), MemoryStore()
    with TierStore([open_one, sealed]) as store:
        assert not store.read_only
        assert store.write(key_of(1), [b"value"])
    assert open_one.contains([key_of(1)]) == [True]
    assert TierStore([Sealed()]).read_only


def test_a_caches_limits_bound_what_its_tiers_hold_and_how_long_closing_takes() -> None:
    for limits in (None, Limits(tier_queue_bytes=5000, exit_flush_seconds=0.5)):
        with open_store(["memory:1MB", "memory:2MB"], limits) as tiers:
            expected = limits or Limits()
            assert isinstance(tiers, TierStore)
            assert tiers._queue.has_room(expected.tier_queue_bytes)
            assert not tiers._queue.has_room(expected.tier_queue_bytes + 1)
            assert tiers._queue.exit_seconds == expected.exit_flush_seconds


UNUSABLE = [
    "redis://127.0.0.1:1/0",
    "rediss://127.0.0.1:1/0",
    "redis+unix:///nowhere/redis.sock",
    "s3://bucket/prefix",
    "hf://org/pack",
    "mooncake://127.0.0.1:1/prefix",
    "pack:/nowhere",
    "/dev/null/kv",
    "/dev/null",
    "file:///proc/nowhere/kv",
    ["redis://127.0.0.1:1/0"],
]


@pytest.mark.fault(
    "Stores",
    "A store was never usable: no server answers, a path cannot be made, credentials or a client library are missing.",
    "Making the cache is an error of one sentence, without what client libraries print.",
)
@pytest.mark.parametrize("spec", UNUSABLE, ids=str)
def test_a_store_that_never_was_usable_is_refused_when_the_cache_is_made(
    spec: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreError) as caught:
        CakeCache(shared_model("llama"), spec)  # type: ignore[arg-type]
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 400
    assert not any(sign in said for sign in ("Traceback", "Debug source", "Error(", "object at 0x", "__init__"))


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "not a url", "http://", "ftp://host", "http://host:port", "//host"]
)
def test_an_endpoint_at_which_the_client_would_panic_is_refused_at_once(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreError, match=r"^The endpoint .* makes no sense: .*; write it like https://host:9000"):
        open_store("s3://bucket/prefix")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[profile other]\n", "nobody"),
        ("[broken\n", "config"),
        ("[profile nobody]\nsource_profile = gone\nrole_arn = x\n", "gone"),
    ],
)
def test_a_profile_that_is_none_is_one_sentence(
    config: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(
        StoreError, match=rf"^The credentials for S3 cannot be found \(.*{words}.*\); set AWS_ACCESS_KEY_ID"
    ) as caught:
        open_store("s3://bucket/prefix")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///prefix", "gs://", "az:///x", "s3://bucket?x", "s3://key:value@bucket", "s3://bucket#x"]
)
def test_a_bucket_and_a_prefix_are_all_that_a_url_of_object_storage_has(url: str) -> None:
    with pytest.raises(
        StoreError, match=r"no bucket is named|takes no options|has a bucket and a prefix, and no credentials"
    ):
        open_store(url)
