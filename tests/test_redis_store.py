"""Redis: the contract against a real server on loopback, and what it promises beyond it."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

from cake_hf import CakeCache, CorruptChunk, StoreError
from cake_hf.stores import Store, open_store
from cake_hf.stores.redis import RedisStore
from cake_hf.stores.redis_wire import Manifest
from cake_hf.testing import StoreContract, check_against_dict
from cake_hf.testing.contract import key_of, read_parts, read_whole, run_together, value_of
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from servers import Relay, Server, free_port, start_redis_server
from waiting import await_answer, await_true

pytest_plugins = ["servers"]

SLICE = 300
"""Bytes of a slice in most tests: a value of 1000 bytes has four."""

_prefixes = count()


def new_url(port: int, options: str = "") -> str:
    """A place where nothing is stored yet."""
    return f"redis://127.0.0.1:{port}/0?prefix=test-{next(_prefixes)}{options}"


class TestRedisStore(StoreContract):
    slice_bytes = 4 * 2**20

    @pytest.fixture
    def store(self, redis_server: Server) -> Iterator[Store]:
        self.url = new_url(redis_server.port)
        with RedisStore(self.url, slice_bytes=self.slice_bytes) as store:
            yield store

    def reopen(self, store: Store) -> Store:
        return RedisStore(self.url)


class TestRedisStoreOfManySlices(TestRedisStore):
    slice_bytes = 1999


def test_redis_store_behaves_like_a_dict(redis_server: Server) -> None:
    assert check_against_dict(lambda: RedisStore(new_url(redis_server.port), slice_bytes=7), max_examples=60) >= 1000


class Setup:
    """A store, and a plain client that looks at what it does to the server."""

    def __init__(self, port: int, options: str = "") -> None:
        self.port = port
        self.url = new_url(port, options)
        self.prefix = self.url.partition("prefix=")[2].partition("&")[0]
        self.store = RedisStore(self.url, slice_bytes=SLICE)
        self.client: Any = redis.Redis(port=port, protocol=2)

    def names(self) -> list[str]:
        return sorted(name.decode() for name in self.client.keys(f"{self.prefix}:*"))

    def manifest(self, number: int) -> str:
        return f"{self.prefix}:{key_of(number)}"

    def slices(self, number: int) -> list[str]:
        return [name for name in self.names() if name.startswith(self.manifest(number) + ":")]


@pytest.fixture
def setup(redis_server: Server) -> Iterator[Setup]:
    setup = Setup(redis_server.port)
    with setup.store, setup.client:
        yield setup


# What is on the server.


def test_a_value_is_a_manifest_and_slices(setup: Setup) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    assert b"".join(setup.client.mget(setup.slices(1))) == value_of(1)
    assert [setup.client.strlen(name) for name in setup.slices(1)] == [300, 300, 300, 100]
    assert len(setup.names()) == 5


def test_replaced_and_deleted_values_leave_no_slices(setup: Setup) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    before = setup.names()
    setup.store.write(key_of(1), [value_of(2)], replace=True)
    assert len(setup.names()) == 5
    assert set(setup.names()) & set(before) == {setup.manifest(1)}
    assert setup.store.write(key_of(1), [value_of(3)]) is False
    assert len(setup.names()) == 5
    setup.store.delete(key_of(1))
    assert setup.names() == []


@pytest.mark.parametrize("offset", [0, 1, 299, 300, 301, 600, 999])
@pytest.mark.parametrize("size", [1, 299, 300, 301, 700, 1000])
def test_ranges_across_slices(setup: Setup, offset: int, size: int) -> None:
    setup.store.write(key_of(1), [value_of(1)], replace=True)
    buffer = bytearray(min(size, 1000 - offset))
    assert setup.store.read_range(key_of(1), [memoryview(buffer)], offset)
    assert buffer == value_of(1)[offset : offset + size]


def test_stores_with_other_slices_and_prefixes_share_a_server(setup: Setup, redis_server: Server) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    with RedisStore(setup.url) as same, RedisStore(new_url(redis_server.port)) as other:
        assert read_whole(same, key_of(1)) == value_of(1)
        assert list(other.keys()) == []


def test_many_values_are_looked_up_and_listed(setup: Setup) -> None:
    """More than fit into one round trip."""
    stored = range(0, 1300, 2)
    for number in stored:
        setup.store.write(key_of(number), [b"%d" % number])
    assert setup.store.contains([key_of(n) for n in range(1300)]) == [n % 2 == 0 for n in range(1300)]
    assert sorted(setup.store.keys()) == sorted(map(key_of, stored))


# Time to live.


def test_values_with_a_ttl_go_before_their_slices_do(redis_server: Server) -> None:
    setup = Setup(redis_server.port, "&ttl=100")
    with setup.store, setup.client:
        setup.store.write(key_of(1), [value_of(1)])
        life = setup.client.ttl(setup.manifest(1))
        assert 0 < life <= 100
        assert all(setup.client.ttl(name) > life for name in setup.slices(1))
        assert setup.client.expire(setup.manifest(1), -1)  # as if the time had come
        assert setup.store.contains([key_of(1)]) == [False]
        assert setup.store.read(key_of(1)) is None


def test_values_without_a_ttl_stay(setup: Setup) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    assert [setup.client.ttl(name) for name in setup.names()] == [-1] * 5


@pytest.mark.parametrize("ttl", ["0", "-5", "1.5", "day", ""])
def test_a_ttl_that_is_none_is_refused(ttl: str) -> None:
    with pytest.raises(StoreError, match="write it like ttl=86400"):
        RedisStore(f"redis://localhost/0?ttl={ttl}")


# Values that have lost a slice, or are not what they should be.


@pytest.mark.parametrize("lost", range(4))
def test_a_value_with_an_evicted_slice_is_a_miss_and_cleaned_up(setup: Setup, lost: int) -> None:
    for read in (
        lambda: setup.store.read_into(key_of(1), [memoryview(bytearray(1000))]) is None,
        lambda: not setup.store.read_range(key_of(1), [memoryview(bytearray(300))], 300 * lost + 5 - 300 * (lost == 3)),
        lambda: setup.store.contains([key_of(1)]) == [False],
        lambda: list(setup.store.keys()) == [],
    ):
        assert setup.store.write(key_of(1), [value_of(1)]) is True
        setup.client.delete(setup.slices(1)[lost])
        assert read()
        assert setup.names() == []


def test_a_value_with_an_evicted_slice_can_be_written_again(setup: Setup) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    setup.client.delete(setup.slices(1)[2])
    assert setup.store.size(key_of(1)) is None
    assert setup.store.write(key_of(1), [value_of(1)]) is True
    assert read_whole(setup.store, key_of(1)) == value_of(1)
    assert len(setup.names()) == 5


@pytest.mark.parametrize("damaged", [b"", b"short", bytes(299), bytes(301), bytes(5000)])
def test_a_slice_of_another_length_is_corrupt(setup: Setup, damaged: bytes) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    setup.client.set(setup.slices(1)[1], damaged)
    assert setup.store.size(key_of(1)) is None
    if damaged:
        with pytest.raises(CorruptChunk, match="another length"):
            setup.store.read_into(key_of(1), [memoryview(bytearray(1000))])
    assert setup.store.write(key_of(1), [value_of(1)], replace=True) is True
    assert read_whole(setup.store, key_of(1)) == value_of(1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense",
        b"\x80" * 5000,
        b"2 1000 300 0123456789abcdef",
        b"1 1000 0 0123456789abcdef",
        b"1 -1000 300 0123456789abcdef",
        b"1 1000 300 0123456789ABCDEF",
        b"1 1000 300 0123456789abcdef\n",
        b"1 999999999999999 1 0123456789abcdef",
        b"1 999999999999999 9999999999 0123456789abcdef",
    ],
)
def test_a_manifest_that_makes_no_sense_is_a_miss_and_written_over(setup: Setup, raw: bytes) -> None:
    setup.client.set(setup.manifest(1), raw)
    assert setup.store.contains([key_of(1)]) == [False]
    assert setup.store.size(key_of(1)) is None
    assert setup.store.read(key_of(1)) is None
    assert list(setup.store.keys()) == []
    setup.client.set(setup.manifest(1), raw)
    assert setup.store.write(key_of(1), [value_of(1)]) is True
    assert read_whole(setup.store, key_of(1)) == value_of(1)


def test_no_memory_is_taken_for_what_a_manifest_claims(setup: Setup) -> None:
    """One slice that is there, and said to be of ten gigabytes."""
    claim = Manifest(9_999_999_999, 9_999_999_999, "0123456789abcdef")
    setup.client.set(setup.manifest(1), claim.encode())
    setup.client.set(f"{setup.manifest(1)}:{claim.tag}:0", b"tiny")
    assert setup.store.read(key_of(1)) is None


def test_foreign_keys_are_not_listed(setup: Setup) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    for name in (f"{setup.prefix}:{'g' * 40}", f"{setup.prefix}:{'é' * 20}", f"{setup.prefix}:x", "other"):
        setup.client.set(name, b"1 4 4 0123456789abcdef")
    assert list(setup.store.keys()) == [key_of(1)]
    setup.client.delete("other")


def test_a_key_of_another_type_is_said(setup: Setup) -> None:
    setup.client.rpush(setup.manifest(1), "a list")
    with pytest.raises(StoreError, match="wrong kind of value"):
        setup.store.read(key_of(1))


# Writers and readers that meet.


@pytest.fixture
def between(setup: Setup, relay_to: Callable[[int], Relay]) -> Iterator[tuple[RedisStore, Relay]]:
    """Another store at the same place, and what it reaches the server through."""
    relay = relay_to(setup.port)
    with RedisStore(setup.url.replace(f":{setup.port}/", f":{relay.port}/"), slice_bytes=SLICE) as store:
        yield store, relay


Between = tuple[RedisStore, Relay]


@pytest.fixture
def reading(read_only: ReadOnly, relay_to: Callable[[int], Relay]) -> Iterator[Between]:
    """A store of one who may only read, and what it reaches the server through."""
    port = int(read_only.url.rpartition(":")[2].partition("/")[0])
    relay = relay_to(port)
    with RedisStore(read_only.url.replace(f":{port}/", f":{relay.port}/")) as store:
        yield store, relay


def once_slices_are_named(relay: Relay, name: str, act: Callable[[], object]) -> list[object]:
    """Has it act when the first command about slices of that manifest is on its way; gives what the act returned."""
    acted: list[object] = []

    def heard(data: bytes) -> None:
        if not acted and f"{name}:".encode() in data:
            acted.append(act())

    relay.heard = heard
    return acted


def test_a_value_replaced_under_a_reader_is_read_anew(setup: Setup, between: Between) -> None:
    """Between the reader's look at the manifest and its reading of the slices, which are gone then."""
    setup.store.write(key_of(1), [value_of(1)])
    store, relay = between
    replace = partial(setup.store.write, key_of(1), [value_of(2)], replace=True)
    replaced = once_slices_are_named(relay, setup.manifest(1), replace)
    assert read_parts(store, key_of(1), [400, 600]) == value_of(2)
    assert replaced == [True]
    assert len(setup.names()) == 5


def test_a_writer_that_dies_leaves_nothing_that_lasts(setup: Setup, between: Between) -> None:
    """The server hears no more of it once it has two slices."""
    store, relay = between
    relay.heard = lambda data: relay.close() if len(setup.slices(1)) == 2 else None
    with pytest.raises(StoreError):
        store.write(key_of(1), [value_of(1)])
    assert list(setup.store.keys()) == []
    assert setup.store.contains([key_of(1)]) == [False]
    assert len(setup.names()) == 2
    assert all(0 < setup.client.ttl(name) <= 900 for name in setup.names())


def test_of_two_writers_of_a_key_one_comes_second(setup: Setup, between: Between) -> None:
    """The other's manifest appears while the slices are uploaded."""
    store, relay = between
    written = once_slices_are_named(relay, setup.manifest(1), lambda: setup.store.write(key_of(1), [value_of(1)]))
    assert store.write(key_of(1), [value_of(2)]) is False
    assert written == [True]
    assert read_whole(setup.store, key_of(1)) == value_of(1)
    assert len(setup.names()) == 5


def test_an_answer_that_got_lost_after_the_publication_is_no_failure(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sends the transaction again, and the server has carried it out already."""
    pipeline = redis.client.Pipeline
    execute = pipeline.execute

    def twice(self: Any, *arguments: Any, **options: Any) -> Any:
        commands = list(self.command_stack)
        result = execute(self, *arguments, **options)
        if any(command[0][0] == "SET" for command in commands):
            self.command_stack = commands
            return execute(self, *arguments, **options)
        return result

    monkeypatch.setattr(pipeline, "execute", twice)
    assert setup.store.write(key_of(1), [value_of(1)]) is True
    monkeypatch.undo()
    assert read_whole(setup.store, key_of(1)) == value_of(1)


def test_reading_a_range_keeps_the_whole_value_young(setup: Setup) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    setup.client.config_resetstat()
    setup.store.read_range(key_of(1), [memoryview(bytearray(10))], 5)
    stats = setup.client.info("commandstats")
    assert stats["cmdstat_touch"]["calls"] == 1
    assert stats["cmdstat_getrange"]["calls"] == 2  # the manifest, and no more than was asked for


def test_connections_are_used_again(setup: Setup) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    setup.client.config_resetstat()
    for _ in range(20):
        assert read_whole(setup.store, key_of(1)) == value_of(1)
    assert setup.client.info("stats")["total_connections_received"] <= 1

    def misses(number: int) -> None:
        for _ in range(10):
            assert setup.store.write(key_of(number), [value_of(number)]) is True
            setup.client.delete(setup.slices(number)[0])
            assert setup.store.read_into(key_of(number), [memoryview(bytearray(1000))]) is None

    run_together([partial(misses, number) for number in range(2, 6)])
    assert setup.client.info("clients")["connected_clients"] < 40


def test_a_connection_on_which_answers_are_under_way_is_closed(setup: Setup) -> None:
    """The next borrower would take them for its own."""
    setup.store.write(key_of(1), [value_of(1)])
    setup.client.delete(setup.slices(1)[0])
    assert setup.store.read_into(key_of(1), [memoryview(bytearray(1000))]) is None
    assert [line.is_connected for line in setup.store._lines._available_connections] == [False]


# The server's budget.


def test_a_server_that_evicts_serves_what_is_whole(tmp_path: Path) -> None:
    server = start_redis_server(tmp_path, "--maxmemory", "12mb", "--maxmemory-policy", "allkeys-lru")
    try:
        store = RedisStore(new_url(server.port), slice_bytes=100_000)
        keys = [key_of(number) for number in range(40)]
        with store, redis.Redis(port=server.port, protocol=2) as client:
            for number, key in enumerate(keys):
                with suppress(StoreError):  # It may be the new value's own slices that the server picks.
                    assert store.write(key, [value_of(number, 500_000)]) is True
            assert client.info("stats")["evicted_keys"] > 0
            assert client.info("memory")["used_memory"] < 16 * 2**20
            client.config_set("maxmemory", "64mb")  # Now nothing more goes, and it can be seen what is left.
            values = [read_whole(store, key) for key in keys]
            assert all(value in (None, value_of(number, 500_000)) for number, value in enumerate(values))
            there = [value is not None for value in values]
            assert 0 < sum(there) < 40
            assert store.contains(keys) == there
            assert sorted(store.keys()) == sorted(key for key, is_there in zip(keys, there, strict=True) if is_there)
    finally:
        server.kill()


def test_a_value_whose_slices_are_evicted_while_it_is_written_is_uploaded_again(setup: Setup, between: Between) -> None:
    """When all four are there, and before the manifest is."""
    store, relay = between
    heard: list[bytes] = []
    evicted: list[int] = []

    def evict_first(data: bytes) -> None:
        heard.append(data)
        if not evicted and len(slices := setup.slices(1)) == 4:
            evicted.append(setup.client.delete(slices[2]))

    relay.heard = evict_first
    assert store.write(key_of(1), [value_of(1)]) is True
    assert evicted == [1]
    assert len(re.findall(rb"\r\nSET\r\n\$\d+\r\n%b:" % setup.manifest(1).encode(), b"".join(heard))) == 8
    assert read_whole(setup.store, key_of(1)) == value_of(1)
    assert len(setup.names()) == 5


def test_a_server_that_is_full_says_what_to_do(tmp_path: Path) -> None:
    server = start_redis_server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    try:
        with RedisStore(new_url(server.port), slice_bytes=100_000) as store:
            for number in range(3):
                assert store.write(key_of(number), [value_of(number, 500_000)]) is True
            with pytest.raises(StoreError, match="memory is full; raise maxmemory"):
                store.write(key_of(3), [value_of(3, 5_000_000)])
            assert sorted(store.keys()) == sorted(map(key_of, range(3)))
            assert read_whole(store, key_of(0)) == value_of(0, 500_000)
            assert store.write(key_of(4), [value_of(4, 500_000)]) is True
    finally:
        server.kill()


def test_a_value_that_evicts_itself_is_not_listed(tmp_path: Path) -> None:
    server = start_redis_server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru")
    try:
        with RedisStore(new_url(server.port), slice_bytes=100_000) as store:
            with pytest.raises(StoreError, match="raise the server's maxmemory"):
                store.write(key_of(1), [value_of(1, 8_000_000)])
            assert list(store.keys()) == []
    finally:
        server.kill()


# The server is gone, silent, or refuses.


def test_a_server_killed_in_mid_read_is_a_store_error_and_the_next_one_is_found(
    tmp_path: Path, relay_to: Callable[[int], Relay]
) -> None:
    server = start_redis_server(tmp_path)
    relay = relay_to(server.port)
    with RedisStore(new_url(relay.port), slice_bytes=SLICE) as store:
        store.write(key_of(1), [value_of(1)])
        relay.limit(700, then=lambda: (server.kill(), relay.cut()))
        with pytest.raises(StoreError, match="cannot be reached or broke off"):
            store.read_into(key_of(1), [memoryview(bytearray(1000))])
        assert relay.spent.is_set()
        for call in every_call(store):
            with pytest.raises(StoreError, match="cannot be reached or broke off"):
                call()
        again = start_redis_server(tmp_path, port=server.port)
        try:
            assert store.contains([key_of(1)]) == [False]
            assert store.write(key_of(1), [value_of(1)]) is True
            assert read_whole(store, key_of(1)) == value_of(1)
        finally:
            again.kill()


def every_call(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.contains([key_of(1)]),
        lambda: store.read_into(key_of(1), [memoryview(bytearray(1000))]),
        lambda: store.read_range(key_of(1), [memoryview(bytearray(10))], 5),
        lambda: store.write(key_of(2), [value_of(2)]),
        lambda: store.write(key_of(1), [value_of(1)], replace=True),
        lambda: store.delete(key_of(1)),
        lambda: list(store.keys()),
        lambda: store.size(key_of(1)),
        store.check_writable,
    ]


def test_an_unreachable_server_is_a_store_error() -> None:
    with RedisStore(f"redis://user:secret@127.0.0.1:{free_port()}/0") as store:
        for call in every_call(store):
            with pytest.raises(StoreError, match="start it, or correct the host and port") as caught:
                call()
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("nbytes", [0, 100, 700])
def test_silence_is_a_store_error(redis_server: Server, relay_to: Callable[[int], Relay], nbytes: int) -> None:
    relay = relay_to(redis_server.port)
    with RedisStore(new_url(relay.port), slice_bytes=SLICE, timeout=0.2) as store:
        await_answer(lambda: store.write(key_of(1), [value_of(1)]))
        relay.limit(nbytes)
        with pytest.raises(StoreError, match="does not answer in time"):
            store.read_into(key_of(1), [memoryview(bytearray(1000))])
        relay.cut()
        assert await_answer(lambda: read_whole(store, key_of(1))) == value_of(1)


def test_a_write_that_breaks_off_is_not_listed(redis_server: Server, relay_to: Callable[[int], Relay]) -> None:
    relay = relay_to(redis_server.port)
    with RedisStore(new_url(relay.port), slice_bytes=SLICE) as store:
        relay.limit(1200, then=relay.cut, side="client")
        with pytest.raises(StoreError, match="cannot be reached or broke off"):
            store.write(key_of(1), [value_of(1, 3000)])
        assert relay.spent.is_set()
        assert list(store.keys()) == []
        assert store.write(key_of(1), [value_of(1, 3000)]) is True


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server that wants passwords, and has TLS and a local socket, too."""
    folder = tmp_path_factory.mktemp("guarded")
    make_certificate(folder)
    tls_port = free_port()
    server = start_redis_server(
        folder,
        *("--requirepass", "secret", "--user", "reader", "on", ">pass", "~*", "+@read", "+@connection"),
        *("--unixsocket", str(folder / "redis.sock")),
        *("--tls-port", str(tls_port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(folder / "cert.pem"), "--tls-key-file", str(folder / "key.pem")),
        *("--tls-ca-cert-file", str(folder / "cert.pem")),
    )
    (folder / "tls-port").write_text(str(tls_port))
    yield server, folder
    server.kill()


def make_certificate(folder: Path) -> None:
    """A certificate for 127.0.0.1 that signs itself."""
    from datetime import datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def way_in(guarded: tuple[Server, Path], how: str) -> str:
    server, folder = guarded
    tls_port = (folder / "tls-port").read_text()
    return {
        "password": f"redis://:secret@127.0.0.1:{server.port}/3",
        "user": f"redis://default:secret@127.0.0.1:{server.port}/3",
        "socket": f"redis+unix://:secret@{folder}/redis.sock?db=3",
        "tls": f"rediss://:secret@127.0.0.1:{tls_port}/3?ssl_ca_certs={folder}/cert.pem",
    }[how]


@pytest.mark.parametrize("how", ["password", "user", "socket", "tls"])
def test_each_form_of_a_url_opens_the_store(guarded: tuple[Server, Path], how: str) -> None:
    with open_store(way_in(guarded, how)) as store:
        assert isinstance(store, RedisStore)
        value = value_of(1, 9 * 2**20)
        store.check_writable()
        assert store.write(key_of(1), [value[:5], value[5:]]) is True
        assert read_parts(store, key_of(1), [7, 9 * 2**20 - 7]) == value
        buffer = bytearray(1000)
        assert store.read_range(key_of(1), [memoryview(buffer)], 4 * 2**20 - 500)
        assert buffer == value[4 * 2**20 - 500 :][:1000]
        with redis.Redis(port=guarded[0].port, password="secret", db=3, protocol=2) as client:
            assert len(client.keys(f"cake_hf:{key_of(1)}:*")) == 3
        assert store.delete(key_of(1)) is True


@pytest.mark.parametrize("password", ["a/b?c#d", "p@ss:word", "100%", "%41[x]", "ü ℀'\"\\", "+&="])
def test_a_password_may_have_any_character(tmp_path: Path, password: str) -> None:
    with start_redis_server(tmp_path) as server, redis.Redis(port=server.port, protocol=2) as client:
        client.config_set("requirepass", password)
        for login in (f":{quote(password, safe='')}", f"default:{quote(password, safe='')}"):
            with open_store(f"redis://{login}@127.0.0.1:{server.port}/0") as store:
                assert store.write(key_of(1), [value_of(1)], replace=True) is True
                assert read_whole(store, key_of(1)) == value_of(1)


def test_a_certificate_that_is_not_trusted_is_a_store_error(guarded: tuple[Server, Path]) -> None:
    with RedisStore(way_in(guarded, "tls").partition("?")[0]) as store, pytest.raises(StoreError, match="certificate"):
        store.contains([key_of(1)])


@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:secret@"])
def test_a_wrong_login_is_said(guarded: tuple[Server, Path], login: str) -> None:
    with RedisStore(f"redis://{login}127.0.0.1:{guarded[0].port}/0") as store:
        for call in every_call(store):
            with pytest.raises(StoreError, match="wants another user or password") as caught:
                call()
            assert "wrong" not in str(caught.value)


def test_a_user_who_may_not_write_is_told(guarded: tuple[Server, Path]) -> None:
    with RedisStore(f"redis://reader:pass@127.0.0.1:{guarded[0].port}/0") as store:
        assert store.contains([key_of(1)]) == [False]
        for call in (store.check_writable, lambda: store.write(key_of(1), [value_of(1)])):
            with pytest.raises(StoreError, match="this user may not do that"):
                call()


def test_a_replica_takes_no_writes(tmp_path: Path) -> None:
    server = start_redis_server(tmp_path, "--replicaof", "127.0.0.1", str(free_port()))
    try:
        with RedisStore(new_url(server.port)) as store:
            assert store.contains([key_of(1)]) == [False]
            for call in (store.check_writable, lambda: store.write(key_of(1), [value_of(1)])):
                with pytest.raises(StoreError, match="address of the primary"):
                    call()
    finally:
        server.kill()


# Who may only read.


@dataclass
class ReadOnly:
    """Values that were written by one who may, and the way in of one who may only read."""

    writer: RedisStore
    client: Any
    url: str
    follow: Callable[[], None]
    """Returns when the reader sees what the writer did."""

    def evict(self, number: int, slice_number: int) -> None:
        """Take one slice of a value away, as a server does whose memory is full."""
        (name,) = self.client.keys(f"*{key_of(number)}:*:{slice_number}")
        assert self.client.delete(name) == 1
        self.follow()


def of_a_user(tmp_path: Path, rights: Sequence[str]) -> Iterator[ReadOnly]:
    with (
        start_redis_server(tmp_path, "--user", "reader", "on", ">pass", "~*", *rights) as server,
        redis.Redis(port=server.port, protocol=2) as client,
        RedisStore(f"redis://127.0.0.1:{server.port}/0", slice_bytes=SLICE) as writer,
    ):
        yield ReadOnly(writer, client, f"redis://reader:pass@127.0.0.1:{server.port}/0", lambda: None)


def of_a_replica(tmp_path: Path) -> Iterator[ReadOnly]:
    with (
        start_redis_server(tmp_path, "--repl-diskless-sync-delay", "0") as primary,
        start_redis_server(tmp_path, "--replicaof", "127.0.0.1", str(primary.port)) as replica,
        redis.Redis(port=primary.port, protocol=2) as client,
        redis.Redis(port=replica.port, protocol=2) as follower,
        RedisStore(f"redis://127.0.0.1:{primary.port}/0", slice_bytes=SLICE) as writer,
    ):

        def follow() -> None:
            client.incr("mark")
            await_true(lambda: follower.get("mark") == client.get("mark"))

        yield ReadOnly(writer, client, f"redis://127.0.0.1:{replica.port}/0", follow)


READERS: dict[str, Callable[[Path], Iterator[ReadOnly]]] = {
    "a replica": of_a_replica,
    "a user with +@read": partial(of_a_user, rights=["+@read"]),
    "a user with single rights": partial(of_a_user, rights=["+getrange", "+get", "+exists", "+strlen", "+scan"]),
    "a user who may unlink, and not watch": partial(of_a_user, rights=["+@read", "+unlink"]),
    "a user who may not delete": partial(of_a_user, rights=["+@all", "-del", "-unlink", "-touch"]),
}


@pytest.fixture
def read_only(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ReadOnly]:
    yield from READERS[request.param](tmp_path)


TWO_READERS = pytest.mark.parametrize("read_only", list(READERS)[:2], indirect=True)


@pytest.mark.fault(
    "Stores",
    "A value has lost a slice on a Redis replica, or where the user may only read, so what is left of it cannot be removed.",
    "It is a miss like any other; all other chunks are loaded.",
)
@pytest.mark.parametrize("read_only", READERS, indirect=True)
def test_a_lost_slice_is_a_miss_for_who_may_only_read(read_only: ReadOnly) -> None:
    for number in range(4):
        assert read_only.writer.write(key_of(number), [value_of(number)])
    read_only.evict(1, 2)
    keys = [key_of(number) for number in range(4)]
    with open_store(read_only.url) as store:
        for _ in range(2):
            assert store.contains(keys) == [True, False, True, True]
            assert read_whole(store, key_of(2)) == value_of(2)
            assert store.read_into(key_of(1), [memoryview(bytearray(1000))]) is None
            assert store.read_range(key_of(1), [memoryview(bytearray(100))], 650) is False
            buffer = bytearray(100)
            assert store.read_range(key_of(3), [memoryview(buffer)], 250)
            assert buffer == value_of(3)[250:350]
            assert store.size(key_of(1)) is None
            assert sorted(store.keys()) == sorted([keys[0], *keys[2:]])
        assert isinstance(store, RedisStore)
        assert len(store._client.connection_pool._in_use_connections) == 0


@pytest.mark.parametrize("read_only", ["a user who may not delete"], indirect=True)
def test_a_lost_value_that_cannot_be_deleted_is_written_again(read_only: ReadOnly) -> None:
    read_only.writer.write(key_of(1), [value_of(1)])
    read_only.evict(1, 0)
    with RedisStore(read_only.url, slice_bytes=SLICE) as store:
        assert store.contains([key_of(1)]) == [False]
        assert store.write(key_of(1), [value_of(1)]) is True
        assert store.write(key_of(1), [value_of(1)]) is False
        assert read_whole(store, key_of(1)) == value_of(1)


@TWO_READERS
def test_a_lost_value_that_stays_is_not_read_over_and_over(read_only: ReadOnly, reading: Between) -> None:
    read_only.writer.write(key_of(1), [value_of(1)])
    read_only.evict(1, 3)
    store, relay = reading
    heard: list[bytes] = []
    relay.heard = heard.append
    assert store.read_into(key_of(1), [memoryview(bytearray(1000))]) is None
    asked = re.findall(rb"\r\nGET\r\n\$\d+\r\n[^\r]*%b:[^\r]*:(\d)\r" % key_of(1).encode(), b"".join(heard))
    assert asked == [b"0", b"1", b"2", b"3"]


@TWO_READERS
def test_a_prompt_on_a_replica_loads_all_chunks_but_the_one_that_lost_a_slice(read_only: ReadOnly) -> None:
    model = shared_model("llama")
    with CakeCache(model, read_only.writer, chunk_size=CHUNK) as cache:
        run(model, prompt(), cache)
        cache.flush()
    lost = next(iter(read_only.client.scan_iter("cake_hf:*:*:1")))
    read_only.client.delete(lost)
    read_only.follow()
    with CakeCache(model, read_only.url, chunk_size=CHUNK, strategy="load", save=False) as cache:
        outcome = run(model, prompt(), cache)
        report = cache.report
        assert (report.chunks_loaded, report.chunks_missed, report.chunks_failed) == (CHUNKS - 1, 1, 0)
        assert report.reason == ""
    assert difference(outcome, expected("llama")) == ""


@TWO_READERS
def test_a_value_replaced_under_a_reader_on_a_replica_is_read_anew(read_only: ReadOnly, reading: Between) -> None:
    read_only.writer.write(key_of(1), [value_of(1)])
    read_only.follow()

    def replace() -> bool:
        done = read_only.writer.write(key_of(1), [value_of(2)], replace=True)
        read_only.follow()
        return done

    store, relay = reading
    replaced = once_slices_are_named(relay, key_of(1), replace)
    assert read_parts(store, key_of(1), [400, 600]) == value_of(2)
    assert replaced == [True]


# Opening.


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost:port/0", "makes no sense"),
        ("redis://localhost/0?colour=red", "colour"),
        ("redis://localhost/0?prefix=a*b", "letters, digits"),
        ("redis://localhost/0?socket_timeout=soon", "socket_timeout"),
        ("redis://localhost:70000/0", "its port is a number"),
        ("redis://localhost/first", "the number of a database"),
        ("redis://localhost/0/1", "the number of a database"),
        ("redis://", "names no server"),
        ("redis://local host/0", "needs a host"),
        ("redis://a..b/0", "needs a host"),
        (f"redis://{'a' * 64}.example/0", "needs a host"),
        ("redis://localhost/0?ttl=5&ttl=6", "'ttl' stands there twice"),
        ("redis://localhost/0?ttl", "name=value"),
        ("redis://localhost/0#1", "%23"),
        ("redis+unix://", r"redis\+unix:///run/redis.sock"),
        ("redis+unix://run/redis.sock", r"redis\+unix:///run/redis.sock"),
        ("rediss://localhost/0?ssl_ca_certs=/nowhere/ca.pem", "The file that ssl_ca_certs names .* is not there"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        RedisStore(url)


def test_passwords_are_not_shown() -> None:
    url = "redis://user:secret@localhost:6379/2?password=secret&ttl=5"
    assert repr(RedisStore(url)) == "RedisStore('redis://localhost:6379/2')"


def test_options_in_the_url_cannot_change_the_protocol(redis_server: Server) -> None:
    options = "&protocol=3&decode_responses=True&socket_timeout=5"
    with RedisStore(new_url(redis_server.port, options), slice_bytes=SLICE) as store:
        store.write(key_of(1), [value_of(1)])
        assert read_whole(store, key_of(1)) == value_of(1)
        assert list(store.keys()) == [key_of(1)]


def test_a_client_library_that_lends_no_socket_is_said(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.store.write(key_of(1), [value_of(1)])
    monkeypatch.setattr(socket, "socket", ssl.SSLObject)
    with pytest.raises(StoreError, match="pip install"):
        setup.store.read(key_of(1))


def test_time_outs_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RedisStore("redis://localhost", timeout=0)


def test_a_server_that_is_not_installed_skips_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CAKE_HF_REQUIRE_SERVERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        start_redis_server(tmp_path)
    monkeypatch.setenv("CAKE_HF_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match="not installed"):
        start_redis_server(tmp_path)
