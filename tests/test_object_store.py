"""Object storage: the contract against a real S3 service on loopback, and what it promises beyond it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from obstore.store import from_url

from cake_hf import CorruptChunk, StoreError
from cake_hf.stores import LocalStore, Store, object_client, open_store
from cake_hf.stores import object as object_module
from cake_hf.stores.object import ObjectStore
from cake_hf.testing import StoreContract, check_against_dict
from cake_hf.testing.contract import key_of, read_parts, read_whole, value_of
from servers import Relay, S3Server, free_port
from waiting import await_answer

pytest_plugins = ["servers"]

_prefixes = count()


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture
def url(bucket: str) -> str:
    """A place where nothing is stored yet."""
    return new_url(bucket)


def new_url(bucket: str) -> str:
    return f"s3://{bucket}/prefix/{next(_prefixes)}"


@pytest.fixture
def store(s3_server: S3Server, url: str) -> Iterator[ObjectStore]:
    with ObjectStore(url, options=s3_server.options) as store:
        yield store


@pytest.fixture
def client(s3_server: S3Server, url: str) -> Any:
    """A plain client at the same place, that looks at what the store does."""
    return from_url(url, config=s3_server.options, client_options={"allow_http": True})


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of 1000 bytes are read in four requests."""
    monkeypatch.setattr(object_module, "RANGE_BYTES", 250)


SEQUENCES = int(os.environ.get("CAKE_HF_SEQUENCES", "5"))
"""Of calls on the store and on a dict."""


class TestObjectStore(StoreContract):
    @pytest.fixture
    def store(self, s3_server: S3Server, url: str) -> Iterator[Store]:
        self.options = s3_server.options
        with ObjectStore(url, options=self.options) as store:
            yield store

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, ObjectStore)
        return ObjectStore(store.url, options=self.options)


def test_object_store_behaves_like_a_dict(s3_server: S3Server, bucket: str, small_ranges: None) -> None:
    """Few steps, since each takes twenty requests; CAKE_HF_SEQUENCES=90 makes them a thousand."""
    make = lambda: ObjectStore(new_url(bucket), options=s3_server.options)  # noqa: E731
    assert check_against_dict(make, max_examples=SEQUENCES, steps=12) >= 10 * SEQUENCES


# Objects.


def test_a_value_is_one_object_named_as_in_a_directory(store: ObjectStore, client: Any, tmp_path: Path) -> None:
    LocalStore(tmp_path).write(key_of(1), [value_of(1)])
    (file,) = tmp_path.glob("??/*")
    client.put(str(file.relative_to(tmp_path)), file.read_bytes())
    assert read_whole(store, key_of(1)) == value_of(1)
    assert store.write(key_of(1), [value_of(1)]) is False
    store.write(key_of(2), [value_of(2)])
    assert bytes(client.get(f"{key_of(2)[:2]}/{key_of(2)}.safetensors").bytes()) == value_of(2)


def test_foreign_objects_are_not_listed(store: ObjectStore, client: Any) -> None:
    store.write(key_of(1), [value_of(1)])
    shard = key_of(1)[:2]
    for name in (
        "README.md",
        f"{key_of(2)}.safetensors",
        f"{shard}/notes.txt",
        f"{shard}/{key_of(1)}.safetensors.bak",
        f"{shard}/{shard}{'G' * 38}.safetensors",
        f"ff{shard}/{key_of(1)}.safetensors",
        f"{'00' if shard != '00' else '11'}/{key_of(1)}.safetensors",
        f"deeper/{shard}/{key_of(1)}.safetensors",
    ):
        client.put(name, b"foreign")
    assert list(store.keys()) == [key_of(1)]


def test_prefixes_keep_stores_apart(s3_server: S3Server, bucket: str) -> None:
    names = [f"s3://{bucket}/apart", f"s3://{bucket}/apart/below", f"s3://{bucket}/apart-too"]
    stores = [ObjectStore(name, options=s3_server.options) for name in names]
    for number, store in enumerate(stores):
        store.write(key_of(number), [b"value"])
    assert [list(store.keys()) for store in stores] == [[key_of(0)], [key_of(1)], [key_of(2)]]


def test_an_empty_value_is_a_value(store: ObjectStore) -> None:
    assert store.write(key_of(1), [b"", b""]) is True
    assert store.read_into(key_of(1), []) == 0
    assert store.read(key_of(1)) == b""


def test_many_keys_are_looked_up_and_listed(store: ObjectStore) -> None:
    for number in range(0, 100, 2):
        store.write(key_of(number), [b"value"])
    assert store.contains([key_of(n) for n in range(100)]) == [n % 2 == 0 for n in range(100)]
    assert sorted(store.keys()) == sorted(key_of(n) for n in range(0, 100, 2))


def test_a_closed_store_says_so(store: ObjectStore) -> None:
    store.close()
    with pytest.raises(StoreError, match="the store is closed; open it again"):
        store.contains([key_of(1)])


def test_a_store_that_is_closed_under_a_reader_says_so(
    s3_server: S3Server, url: str, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One range is being read, others wait for their turn."""
    monkeypatch.setattr(object_module, "REQUESTS", 1)
    fetch = ObjectStore._fetch

    def close_meanwhile(self: ObjectStore, key: str, start: int, parts: Any) -> Any:
        if start == 250:
            self.close()
        return fetch(self, key, start, parts)

    with ObjectStore(url, options=s3_server.options) as store:
        store.write(key_of(1), [value_of(1)])
        monkeypatch.setattr(ObjectStore, "_fetch", close_meanwhile)
        with pytest.raises(StoreError, match="the store is closed; open it again"):
            store.read_into(key_of(1), [memoryview(bytearray(1000))])


# Ranges.


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [250] * 4, [333, 0, 667], [10] * 100])
def test_ranges_come_together(store: ObjectStore, small_ranges: None, sizes: list[int]) -> None:
    store.write(key_of(1), [value_of(1)])
    assert read_parts(store, key_of(1), sizes) == value_of(1)


@pytest.mark.parametrize("size", [0, 1, 249, 250, 251, 500, 999, 1001, 1250, 2000])
def test_a_value_of_another_length_is_corrupt(store: ObjectStore, small_ranges: None, size: int) -> None:
    store.write(key_of(1), [value_of(1, size)])
    with pytest.raises(CorruptChunk):
        store.read_into(key_of(1), [memoryview(bytearray(1000))])
    assert read_whole(store, key_of(1)) == value_of(1, size)


@pytest.mark.parametrize("size", [0, 1, 250, 750, 999])
def test_a_range_of_a_value_that_ends_early_is_corrupt(store: ObjectStore, small_ranges: None, size: int) -> None:
    store.write(key_of(1), [value_of(1, size)])
    with pytest.raises(CorruptChunk):
        store.read_range(key_of(1), [memoryview(bytearray(900))], 100)


def test_a_value_replaced_between_its_ranges_is_read_anew(
    store: ObjectStore, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(key_of(1), [value_of(1)])
    replaced = []

    def one_by_one(calls: Any) -> Any:
        first = calls[0]()
        if not replaced:
            replaced.append(store.write(key_of(1), [value_of(2)], replace=True))
        return [first, *(call() for call in calls[1:])]

    monkeypatch.setattr(store, "_together", one_by_one)
    assert read_parts(store, key_of(1), [1000]) == value_of(2)
    assert replaced == [True]


def test_a_value_that_is_always_being_replaced_is_a_store_error(
    store: ObjectStore, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(key_of(1), [value_of(1)])
    numbers = count(2)

    def replace_between(calls: Any) -> Any:
        first = calls[0]()
        store.write(key_of(1), [value_of(next(numbers))], replace=True)
        return [first, *(call() for call in calls[1:])]

    monkeypatch.setattr(store, "_together", replace_between)
    with pytest.raises(StoreError, match="was replaced 5 times"):
        read_parts(store, key_of(1), [1000])


def test_nothing_writes_to_the_buffers_of_a_read_that_failed(
    store: ObjectStore, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk is computed into the same place then."""
    store.write(key_of(1), [value_of(1)])
    fetch, go_on, ended = ObjectStore._fetch, threading.Event(), []

    def late(self: ObjectStore, key: str, start: int, parts: Any) -> Any:
        if start == 0:
            go_on.set()
            raise OSError("the first range fails while others are under way")
        assert go_on.wait(60)
        fetch(self, key, start, parts)
        ended.append(start)
        raise OSError("and so do the others, once they have written")

    monkeypatch.setattr(ObjectStore, "_fetch", late)
    monkeypatch.setattr(store._pool, "submit", run_and_hold(store._pool.submit))
    with pytest.raises(StoreError):
        store.read_into(key_of(1), [memoryview(bytearray(1000))])
    assert sorted(ended) == [250, 500, 750]


def run_and_hold(submit: Callable[..., Any]) -> Callable[..., Any]:
    """Calls that cannot be cancelled any more when `submit` returns."""

    def running(call: Callable[[], Any]) -> Any:
        begun = threading.Event()

        def run() -> Any:
            begun.set()
            return call()

        future = submit(run)
        assert begun.wait(60)
        return future

    return running


# The service is gone, silent, or refuses.


def every_call(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.contains([key_of(1), key_of(2)]),
        lambda: store.read_into(key_of(1), [memoryview(bytearray(1000))]),
        lambda: store.read_range(key_of(1), [memoryview(bytearray(10))], 5),
        lambda: store.write(key_of(1), [value_of(1)]),
        lambda: store.write(key_of(1), [value_of(1)], replace=True),
        lambda: store.delete(key_of(1)),
        lambda: list(store.keys()),
        lambda: store.size(key_of(1)),
        store.check_writable,
    ]


def test_nobody_there_is_a_store_error(s3_server: S3Server) -> None:
    options = {**s3_server.options, "endpoint": f"http://127.0.0.1:{free_port()}"}
    with ObjectStore("s3://bucket/prefix", options=options, timeout=0.4) as store:
        for call in every_call(store):
            with pytest.raises(StoreError, match="s3://bucket/prefix: the service cannot be reached"):
                call()


def test_a_bucket_that_is_not_there_is_said(s3_server: S3Server) -> None:
    with ObjectStore("s3://no-such-bucket/prefix", options=s3_server.options) as store:
        for call in (
            lambda: store.write(key_of(1), [value_of(1)]),
            lambda: list(store.keys()),
            lambda: store.read_into(key_of(1), [memoryview(bytearray(10))]),
            store.check_writable,
        ):
            with pytest.raises(StoreError, match="there is no such bucket; make it, or correct the URL"):
                call()


@pytest.mark.parametrize("nbytes", [300, 100_000])
def test_a_connection_that_breaks_in_mid_read_is_a_store_error(
    s3_server: S3Server, url: str, relay_to: Callable[[int], Relay], nbytes: int
) -> None:
    relay = relay_to(s3_server.port)
    options = {**s3_server.options, "endpoint": f"http://127.0.0.1:{relay.port}"}
    value = value_of(1, 400_000)
    with ObjectStore(url, options=options) as store:
        store.write(key_of(1), [value])
        relay.limit(nbytes, then=relay.close)
        with pytest.raises(StoreError, match="cannot be reached or broke off"):
            store.read_into(key_of(1), [memoryview(bytearray(400_000))])
        assert relay.spent.is_set()


def test_a_connection_that_breaks_once_is_made_again(
    s3_server: S3Server, url: str, relay_to: Callable[[int], Relay]
) -> None:
    relay = relay_to(s3_server.port)
    options = {**s3_server.options, "endpoint": f"http://127.0.0.1:{relay.port}"}
    value = value_of(1, 400_000)
    with ObjectStore(url, options=options) as store:
        store.write(key_of(1), [value])
        relay.limit(100_000, then=relay.cut)
        assert read_parts(store, key_of(1), [200_000, 200_000]) == value
        assert relay.spent.is_set()


def test_silence_is_a_store_error(s3_server: S3Server, url: str, relay_to: Callable[[int], Relay]) -> None:
    relay = relay_to(s3_server.port)
    options = {**s3_server.options, "endpoint": f"http://127.0.0.1:{relay.port}"}
    with ObjectStore(url, options=options, timeout=0.4) as store:
        relay.limit(0)
        with pytest.raises(StoreError, match="cannot be reached or broke off"):
            store.read_into(key_of(1), [memoryview(bytearray(1000))])
        relay.cut()
        assert await_answer(lambda: store.read(key_of(1))) is None


def test_an_upload_that_breaks_off_is_not_listed(
    s3_server: S3Server, url: str, relay_to: Callable[[int], Relay]
) -> None:
    relay = relay_to(s3_server.port)
    through = {**s3_server.options, "endpoint": f"http://127.0.0.1:{relay.port}"}
    with ObjectStore(url, options=through) as store, ObjectStore(url, options=s3_server.options) as other:
        relay.limit(200_000, then=relay.close, side="client")
        with pytest.raises(StoreError, match="cannot be reached or broke off"):
            store.write(key_of(1), [value_of(1, 400_000)])
        assert relay.spent.is_set()
        assert list(other.keys()) == []
        assert other.contains([key_of(1)]) == [False]


class Stub:
    """A service that gives the same answer to everything, and remembers what it was asked."""

    def __init__(self, status: int, body: str = "") -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                stub.asked.append((self.command, self.path, dict(self.headers)))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"tag"')
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body.encode())

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(60)
        self._server.server_close()


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    stubs: list[Stub] = []

    def make(status: int, body: str = "") -> Stub:
        stubs.append(Stub(status, body))
        return stubs[-1]

    yield make
    for one in stubs:
        one.close()


def error_of(code: str) -> str:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>message</Message></Error>'


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "Unauthorized", "the credentials are refused; set AWS_ACCESS_KEY_ID"),
        (403, "InvalidAccessKeyId", "the credentials are refused; set AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "the credentials are refused"),
        (403, "AccessDenied", "access is denied; the credentials need the permission"),
        (507, "XMinioStorageFull", "it is full; free some space"),
        (403, "QuotaExceeded", "it is full; free some space"),
        (501, "NotImplemented", "set AWS_CONDITIONAL_PUT=disabled"),
        (400, "AuthorizationHeaderMalformed", "the bucket is in another region; set AWS_REGION"),
        (503, "SlowDown", "overloaded or out of order; try later"),
        (400, "Strange", "check the URL and the service, which said: .*400 Bad Request: Strange message$"),
    ],
)
def test_a_service_that_refuses_is_quoted_with_what_to_do(
    stub: Callable[..., Stub], s3_server: S3Server, status: int, code: str, advice: str
) -> None:
    service = stub(status, error_of(code))
    options = {**s3_server.options, "endpoint": service.endpoint}
    with ObjectStore("s3://bucket/prefix", options=options) as store:
        for call in (store.check_writable, lambda: store.write(key_of(1), [b"value"], replace=True)):
            with pytest.raises(StoreError, match=advice):
                call()


@pytest.mark.parametrize("replace", [True, False])
def test_a_large_value_is_uploaded_in_one_request(
    stub: Callable[..., Stub], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """Several would leave parts behind that cost storage and that nobody sees, if the last one did not come."""
    service = stub(200)
    with ObjectStore("s3://bucket/prefix", options={**s3_server.options, "endpoint": service.endpoint}) as store:
        monkeypatch.setattr(store, "size", lambda key: None)
        assert store.write(key_of(1), [value_of(1, 6 * 2**20), b"more"], replace=replace) is True
    ((method, path, headers),) = service.asked
    assert (method, path) == ("PUT", f"/bucket/prefix/{key_of(1)[:2]}/{key_of(1)}.safetensors")
    assert ("*" if not replace else None) == {name.lower(): value for name, value in headers.items()}.get(
        "if-none-match"
    )


def test_retries_are_bounded(stub: Callable[..., Stub], s3_server: S3Server) -> None:
    service = stub(503, error_of("SlowDown"))
    options = {**s3_server.options, "endpoint": service.endpoint}
    with ObjectStore("s3://bucket/prefix", options=options) as store, pytest.raises(StoreError, match="overloaded"):
        store.read_into(key_of(1), [memoryview(bytearray(10))])
    assert len(service.asked) == 1 + object_client.RETRIES


def test_a_service_without_conditional_writes_can_be_used(s3_server: S3Server, url: str) -> None:
    with ObjectStore(url, options={**s3_server.options, "conditional_put": "disabled"}) as store:
        assert store.write(key_of(1), [b"first"]) is True
        assert store.write(key_of(1), [b"second"]) is False
        assert store.read(key_of(1)) == b"first"


def test_of_two_writers_of_a_key_one_comes_second(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that it is not there."""
    monkeypatch.setattr(store, "size", lambda key: None)
    assert store.write(key_of(1), [b"first"]) is True
    assert store.write(key_of(1), [b"second"]) is False
    assert read_parts(store, key_of(1), [5]) == b"first"


def test_whatever_the_client_does_is_a_store_error(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic in its own code is no `Exception`, and its type is not to be had."""

    class PanicException(BaseException):
        pass

    def panic(path: str) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(store, "_reading", type("Client", (), {"head": staticmethod(panic)}))
    with pytest.raises(StoreError, match="index out of bounds"):
        store.size(key_of(1))


def test_signatures_get_into_no_message() -> None:
    error = ValueError("Error performing GET https://host/path?sig=secret&x=1 in 5 ms\n\nDebug source:\nsecret")
    assert object_client.advice(error, "az").endswith("which said: Error performing GET https://host/path in 5 ms")


# Opening, and where credentials come from.


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that knows nobody; returns the folder of the profiles."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


def test_everything_may_come_from_the_environment(
    s3_server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch, no_credentials: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.options["endpoint"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with open_store(url) as store:
        assert isinstance(store, ObjectStore)
        store.check_writable()
        store.write(key_of(1), [value_of(1)])
        assert read_whole(store, key_of(1)) == value_of(1)


def test_credentials_come_from_the_named_aws_profile(
    stub: Callable[..., Stub], no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_credentials / "credentials").write_text(
        "[default]\naws_access_key_id=NOT-THIS-ONE\naws_secret_access_key=x\n"
        "[team]\naws_access_key_id=KEY-OF-THE-TEAM\naws_secret_access_key=y\n"
    )
    (no_credentials / "config").write_text("[profile team]\nregion=eu-north-1\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    service = stub(404)
    with ObjectStore("s3://bucket/prefix", options={"endpoint": service.endpoint}) as store:
        assert store.contains([key_of(1)]) == [False]
    ((_, _, headers),) = service.asked
    authorization = {name.lower(): value for name, value in headers.items()}["authorization"]
    assert "Credential=KEY-OF-THE-TEAM/" in authorization
    assert "/eu-north-1/s3/" in authorization


def test_no_credentials_are_said_when_the_store_is_opened(no_credentials: Path) -> None:
    with pytest.raises(StoreError, match="There are no credentials for S3; set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket/prefix")


def test_a_public_bucket_needs_no_credentials(
    s3_server: S3Server, url: str, no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.options["endpoint"])
    with open_store(url) as store:
        assert store.contains([key_of(1)]) == [False]


def test_without_botocore_the_client_looks_for_itself(no_credentials: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_client, "import_module", missing_module)
    with open_store("s3://bucket/prefix") as store:
        assert repr(store) == "ObjectStore('s3://bucket/prefix')"


def missing_module(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://", {}, "write it like s3://bucket/prefix"),
        ("s3:///prefix", {}, "write it like s3://bucket/prefix"),
        ("s3://bucket/prefix?region=x", {}, "takes no options in its URL"),
        ("s3://bucket/prefix", {"colour": "red"}, "no such option"),
        ("az://container/prefix", {}, "the storage account is not known; set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(
    s3_server: S3Server, url: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        ObjectStore(url, options=options if url.startswith("az") else {**s3_server.options, **options})


def test_google_and_azure_are_asked_in_their_own_words(
    stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their real services are not at hand; what can be seen is that the requests are theirs."""
    service = stub(404)
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    account = {"gcs_base_url": service.endpoint, "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    google = ObjectStore("gs://bucket/prefix", options={"service_account_key": json.dumps(account)})
    azure = ObjectStore(
        "az://container/prefix",
        options={"account_name": "account", "account_key": "a2V5", "endpoint": service.endpoint},
    )
    for store in (google, azure):
        with store:
            assert store.contains([key_of(1)]) == [False]
            assert store.read(key_of(1)) is None
            assert store.delete(key_of(1)) is False
    (_, for_google, _), *_, (_, for_azure, headers) = service.asked
    assert unquote(for_google) == f"/bucket/prefix/{key_of(1)[:2]}/{key_of(1)}.safetensors"
    assert for_azure == f"/container/prefix/{key_of(1)[:2]}/{key_of(1)}.safetensors"
    assert "x-ms-version" in {name.lower() for name in headers}


def test_a_value_is_asked_for_by_fewer_requests_where_that_is_faster(
    store: ObjectStore, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how many, is learnt elsewhere; here it counts that each way brings the value."""
    asked: list[int] = []
    fetch = store._fetch

    def watched(key: str, start: int, parts: Sequence[memoryview]) -> tuple[int, str]:
        asked.append(sum(part.nbytes for part in parts))
        return fetch(key, start, parts)

    monkeypatch.setattr(store, "_fetch", watched)
    store.write(key_of(1), [value_of(1)])
    for halvings, expected in ((0, [250] * 4), (1, [500] * 2), (2, [1000])):
        monkeypatch.setattr(store._spread, "halvings", lambda most, told=halvings: told)
        assert read_parts(store, key_of(1), [400, 600]) == value_of(1)
        assert asked == expected
        asked.clear()
