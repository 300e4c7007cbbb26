"""Object storage: the contract against a real S3 service on loopback, and what it promises beyond it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from obstore.store import S3Store, from_url

from cake_hf import CorruptChunk, StoreError
from cake_hf.stores import LocalStore, Store, object_client, open_store
from cake_hf.stores.object import ObjectStore
from cake_hf.testing import StoreContract, check_against_dict
from cake_hf.testing.contract import key_of, read_parts, read_whole, value_of
from gateway import Answer, Forward, Gateway, Request
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
def in_ranges(s3_server: S3Server, url: str) -> Iterator[ObjectStore]:
    """It reads values of 1000 bytes in four requests."""
    with ObjectStore(url, options=s3_server.options, range_bytes=250) as store:
        yield store


@pytest.fixture
def gateway(s3_server: S3Server) -> Iterator[Gateway]:
    """Between a store and the service."""
    gateway = Gateway(s3_server.options["endpoint"].removeprefix("http://"))
    yield gateway
    gateway.close()


@pytest.fixture
def through(gateway: Gateway, s3_server: S3Server, url: str) -> Iterator[Callable[..., ObjectStore]]:
    """Opens stores behind the gateway."""
    with ExitStack() as opened:
        options = {**s3_server.options, "endpoint": gateway.endpoint}
        yield lambda **chosen: opened.enter_context(ObjectStore(url, options=options, **chosen))


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


def test_object_store_behaves_like_a_dict(s3_server: S3Server, bucket: str) -> None:
    """Few steps, since each takes twenty requests; CAKE_HF_SEQUENCES=90 makes them a thousand."""
    make = lambda: ObjectStore(new_url(bucket), options=s3_server.options, range_bytes=250)  # noqa: E731
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


def test_a_store_that_is_closed_under_a_reader_says_so(gateway: Gateway, through: Callable[..., ObjectStore]) -> None:
    """Some of its fifty ranges are being read, others wait for their turn."""
    store = through(range_bytes=20)
    store.write(key_of(1), [value_of(1)])

    def close_meanwhile(request: Request, forward: Forward) -> Answer:
        store.close()
        return forward()

    gateway.handle = close_meanwhile
    with pytest.raises(StoreError, match="the store is closed; open it again"):
        store.read_into(key_of(1), [memoryview(bytearray(1000))])


# Ranges.


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [250] * 4, [333, 0, 667], [10] * 100])
def test_ranges_come_together(in_ranges: ObjectStore, sizes: list[int]) -> None:
    in_ranges.write(key_of(1), [value_of(1)])
    assert read_parts(in_ranges, key_of(1), sizes) == value_of(1)


@pytest.mark.parametrize("size", [0, 1, 249, 250, 251, 500, 999, 1001, 1250, 2000])
def test_a_value_of_another_length_is_corrupt(in_ranges: ObjectStore, size: int) -> None:
    in_ranges.write(key_of(1), [value_of(1, size)])
    with pytest.raises(CorruptChunk):
        in_ranges.read_into(key_of(1), [memoryview(bytearray(1000))])
    assert read_whole(in_ranges, key_of(1)) == value_of(1, size)


@pytest.mark.parametrize("size", [0, 1, 250, 750, 999])
def test_a_range_of_a_value_that_ends_early_is_corrupt(in_ranges: ObjectStore, size: int) -> None:
    in_ranges.write(key_of(1), [value_of(1, size)])
    with pytest.raises(CorruptChunk):
        in_ranges.read_range(key_of(1), [memoryview(bytearray(900))], 100)


@pytest.mark.parametrize("times", [1, 4])
def test_a_value_replaced_between_its_ranges_is_read_anew(
    gateway: Gateway, through: Callable[..., ObjectStore], times: int
) -> None:
    store = through(range_bytes=250)
    store.write(key_of(1), [value_of(1)])
    replaced = replace_behind_the_first_range(gateway, store, times)
    assert read_parts(store, key_of(1), [1000]) == value_of(1 + times)
    assert len(replaced) == times


def test_a_value_that_is_always_being_replaced_is_a_store_error(
    gateway: Gateway, through: Callable[..., ObjectStore]
) -> None:
    store = through(range_bytes=250)
    store.write(key_of(1), [value_of(1)])
    replace_behind_the_first_range(gateway, store, 10**6)
    with pytest.raises(StoreError, match="was replaced 5 times"):
        read_parts(store, key_of(1), [1000])


def replace_behind_the_first_range(gateway: Gateway, store: ObjectStore, times: int) -> list[bool]:
    """So often, the first of four ranges of value 1 is of an older value than the others; gives what the writes returned."""
    replaced: list[bool] = []
    others = threading.Semaphore(0)

    def handle(request: Request, forward: Forward) -> Answer:
        if request.start is None:
            return forward()
        if request.start:
            assert others.acquire(timeout=60)
            return forward()
        answer = forward()
        if len(replaced) < times:
            replaced.append(store.write(key_of(1), [value_of(2 + len(replaced))], replace=True))
        others.release(3)
        return answer

    gateway.handle = handle
    return replaced


def test_nothing_writes_to_the_buffers_of_a_read_that_failed(
    gateway: Gateway, through: Callable[..., ObjectStore]
) -> None:
    """The chunk is computed into the same place then."""
    store = through(range_bytes=250)
    store.write(key_of(1), [value_of(1)])
    under_way, over, ended = threading.Barrier(4), threading.Event(), []

    def handle(request: Request, forward: Forward) -> Answer:
        under_way.wait(60)
        if request.start == 0:
            return Answer(403, error_of("AccessDenied").encode())
        ended.append((request.start, over.wait(0.1)))  # long enough for a read that waits for nothing
        return forward()

    gateway.handle = handle
    with pytest.raises(StoreError, match="access is denied"):
        store.read_into(key_of(1), [memoryview(bytearray(1000))])
    over.set()
    assert sorted(ended) == [(250, False), (500, False), (750, False)]


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


def test_an_unreachable_server_is_a_store_error(s3_server: S3Server) -> None:
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


@pytest.fixture
def stub() -> Iterator[Callable[..., Gateway]]:
    """Makes services that give the same answer to everything."""
    stubs: list[Gateway] = []

    def make(status: int, body: str = "") -> Gateway:
        stubs.append(Gateway(handle=lambda request, forward: Answer(status, body.encode())))
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
    stub: Callable[..., Gateway], s3_server: S3Server, status: int, code: str, advice: str
) -> None:
    service = stub(status, error_of(code))
    options = {**s3_server.options, "endpoint": service.endpoint}
    with ObjectStore("s3://bucket/prefix", options=options) as store:
        for call in (store.check_writable, lambda: store.write(key_of(1), [b"value"], replace=True)):
            with pytest.raises(StoreError, match=advice):
                call()


@pytest.mark.parametrize("replace", [True, False])
def test_a_large_value_is_uploaded_in_one_request(
    gateway: Gateway, through: Callable[..., ObjectStore], replace: bool
) -> None:
    """Several would leave parts behind that cost storage and are not listed, if the last one did not come."""
    assert through().write(key_of(1), [value_of(1, 6 * 2**20), b"more"], replace=replace) is True
    (upload,) = (request for request in gateway.asked if request.method != "HEAD")
    assert upload.method == "PUT"
    assert upload.path.endswith(f"/{key_of(1)[:2]}/{key_of(1)}.safetensors")
    assert upload.headers.get("if-none-match") == (None if replace else "*")


def test_retries_are_bounded(stub: Callable[..., Gateway], s3_server: S3Server) -> None:
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


def test_of_two_writers_of_a_key_one_comes_second(gateway: Gateway, through: Callable[..., ObjectStore]) -> None:
    """Both have seen that it is not there."""
    store = through()
    gateway.handle = lambda request, forward: Answer(404) if request.method == "HEAD" else forward()
    assert store.write(key_of(1), [b"first"]) is True
    assert store.write(key_of(1), [b"second"]) is False
    assert read_parts(store, key_of(1), [5]) == b"first"


def test_whatever_the_client_does_is_a_store_error(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic in its own code is no `Exception`, and its type is not to be had."""

    class PanicException(BaseException):
        pass

    def panic(client: S3Store, path: str) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(S3Store, "head", panic)
    with pytest.raises(StoreError, match="index out of bounds"):
        store.size(key_of(1))


def test_signatures_get_into_no_message() -> None:
    error = ValueError("Error performing GET https://host/path?sig=secret&x=1 in 5 ms\n\nDebug source:\nsecret")
    assert object_client.advice(error, "az").endswith("which said: Error performing GET https://host/path in 5 ms")


# Opening, and where credentials come from.


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without credentials; returns the folder of the profiles."""
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
    stub: Callable[..., Gateway], no_credentials: Path, monkeypatch: pytest.MonkeyPatch
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
    (asked,) = service.asked
    authorization = asked.headers["authorization"]
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
    for name in ("botocore", "botocore.session"):
        monkeypatch.setitem(sys.modules, name, None)
    with open_store("s3://bucket/prefix") as store:
        assert repr(store) == "ObjectStore('s3://bucket/prefix')"


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
    stub: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
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
    for_google, for_azure = service.asked[0], service.asked[-1]
    assert unquote(for_google.path) == f"/bucket/prefix/{key_of(1)[:2]}/{key_of(1)}.safetensors"
    assert for_azure.path == f"/container/prefix/{key_of(1)[:2]}/{key_of(1)}.safetensors"
    assert "x-ms-version" in for_azure.headers


def test_a_value_is_asked_for_by_fewer_requests_where_that_is_faster(
    gateway: Gateway, through: Callable[..., ObjectStore]
) -> None:
    """By how many, is learnt elsewhere; here it counts that each way brings the value."""
    asked: list[Request] = []

    def handle(request: Request, forward: Forward) -> Answer:
        asked.append(request)
        return forward()

    store = through(range_bytes=250, clock=lambda: float(len(gateway.asked)))  # each request takes a second
    store.write(key_of(1), [value_of(1)])
    gateway.handle = handle
    for expected in ([0, 250, 500, 750], [0, 500], [0]):
        assert read_parts(store, key_of(1), [400, 600]) == value_of(1)
        assert sorted(request.start for request in asked if request.start is not None) == expected
        asked.clear()
