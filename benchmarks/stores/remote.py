"""The stores behind a server, each beside its client. Without a URL, a server is started on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.servers import Unavailable, start_hub_server, start_redis_server, start_s3_server
from benchmarks.servers.hub import COMMIT, REPO
from benchmarks.stores.contenders import fill, write_pack
from benchmarks.stores.race import Contender, Reader
from benchmarks.stores.values import StoreSettings, Values
from cake_hf.errors import CakeError, StoreError
from cake_hf.stores.base import Store
from cake_hf.stores.hub import HubSource, hub_client
from cake_hf.stores.manifest import chunk_path
from cake_hf.stores.pack import PackStore, digest_of
from cake_hf.stores.pieces import address_of, even_sizes
from cake_hf.util.redaction import shown

SECONDS = 60.0
"""Seconds after which an answer is given up."""

SLICE_BYTES = 4 * 2**20
"""As the Redis store cuts values."""


@contextmanager
def filled(store: Store, values: Values) -> Iterator[None]:
    """Yields the store with all chunks in it; they are removed again, since it may be a user's own store."""
    with store:
        try:
            fill(store, values)
            yield
        finally:
            with suppress(CakeError):
                for key in values.keys:
                    store.delete(key)


@contextmanager
def redis(values: Values, settings: StoreSettings, folder: Path, url: str = "") -> Iterator[Contender]:
    """Measures Redis, beside a bare socket and beside redis-py, which get the same slices.

    Raises:
        Unavailable: the client or, without a URL, the server is not installed.
    """
    try:
        import redis as client_library

        from cake_hf.stores.redis import RedisStore
        from cake_hf.stores.redis_client import RedisAddress
    except ModuleNotFoundError as error:
        raise Unavailable('the Redis client is not installed: pip install "cake-hf[redis]"') from error
    with ExitStack() as stack:
        if not url:
            url = f"redis://127.0.0.1:{stack.enter_context(start_redis_server(folder)).port}/0"
        store = RedisStore(url, slice_bytes=SLICE_BYTES)
        stack.enter_context(filled(store, values))
        address = RedisAddress.parse(url)
        pool = address.pool(SECONDS)
        stack.callback(pool.disconnect)
        client: Any = client_library.Redis(connection_pool=pool)
        names = [[f"{address.prefix}:bench:{key}:{n}" for n in range(len(_slices(values)))] for key in values.keys]
        stack.callback(lambda: client.unlink(*(name for row in names for name in row)))
        for file, row in zip(values.files, names, strict=True):
            for name, (begin, end) in zip(row, _slices(values), strict=True):
                client.set(name, file[begin:end])

        def get(number: int) -> None:
            if sum(len(client.get(name) or b"") for name in names[number]) != values.nbytes:
                raise CakeError("Redis has lost a slice; raise its maxmemory.")

        yield Contender("Redis", store, {"bare socket": _bare_socket(pool, names, values), "redis-py": get})


def _slices(values: Values) -> list[tuple[int, int]]:
    return [(at, min(at + SLICE_BYTES, values.nbytes)) for at in range(0, values.nbytes, SLICE_BYTES)]


def _bare_socket(pool: Any, names: list[list[str]], values: Values) -> Reader:
    """Asks for all slices of a chunk at once, and receives each by one call into memory in one piece."""
    from cake_hf.stores.redis_client import socket_of

    own, spans = threading.local(), _slices(values)

    def read(number: int) -> None:
        if not hasattr(own, "socket"):
            own.socket = socket_of(pool.get_connection())
            own.socket.settimeout(None)
        own.socket.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(n), n.encode()) for n in names[number]))
        for begin, end in spans:
            line = b"$%d\r\n" % (end - begin)
            head, tail = bytearray(len(line)), bytearray(2)
            wanted = [memoryview(head), values.flat[number][begin:end], memoryview(tail)]
            count = own.socket.recvmsg_into(wanted, 0, socket.MSG_WAITALL)[0]
            if bytes(head) != line or count != sum(view.nbytes for view in wanted):
                raise CakeError("Redis has lost a slice, or did not send all of it; raise its maxmemory.")

    return read


@contextmanager
def s3(values: Values, settings: StoreSettings, folder: Path, url: str = "") -> Iterator[Contender]:
    """Measures object storage, beside obstore: the same ranges asked for in one call, and the object as a whole.

    Raises:
        Unavailable: the client or, without a URL, moto is not installed.
    """
    try:
        from cake_hf.stores.object import RANGE_BYTES, SUFFIX, ObjectStore
        from cake_hf.stores.object_client import connect
    except ModuleNotFoundError as error:
        raise Unavailable('the client of object storage is not installed: pip install "cake-hf[object]"') from error
    with ExitStack() as stack:
        options: dict[str, str] = {}
        if not url:
            server = start_s3_server()
            stack.callback(server.kill)
            url, options = f"s3://{server.new_bucket()}/bench", server.options
        store = ObjectStore(url, options=options, timeout=SECONDS)
        stack.enter_context(filled(store, values))
        (client,) = connect(url, options, (SECONDS,))
        paths = [f"{key[:2]}/{key}{SUFFIX}" for key in values.keys]
        sizes = even_sizes(values.nbytes, RANGE_BYTES)
        starts = [sum(sizes[:n]) for n in range(len(sizes))]

        def ranges(number: int) -> None:
            _expect(sum(map(len, client.get_ranges(paths[number], starts=starts, lengths=sizes))), values)

        def whole(number: int) -> None:
            _expect(len(client.get(paths[number]).bytes()), values)

        yield Contender("S3", store, {"get_ranges": ranges, "get": whole})


@contextmanager
def mooncake(values: Values, settings: StoreSettings, folder: Path, url: str) -> Iterator[Contender]:
    """Measures Mooncake, beside its client's `get_into` registered memory in one piece.

    Raises:
        Unavailable: the client is not installed.
    """
    from cake_hf.stores.mooncake import MooncakeStore
    from cake_hf.stores.mooncake_client import MooncakeAddress, join, leave

    address = MooncakeAddress.parse(url)
    with ExitStack() as stack:
        store = MooncakeStore(url)
        stack.enter_context(filled(store, values))
        member = join(address.settings)
        stack.callback(leave, member)
        with member.client() as client:
            spots = [address_of(flat) for flat in values.flat]
            for spot in spots:
                client.register_buffer(spot, values.nbytes)
                stack.callback(client.unregister_buffer, spot)

            def get(number: int) -> None:
                name = f"{address.prefix}/{values.keys[number]}"
                _expect(client.get_into(name, spots[number], values.nbytes), values)

            yield Contender("Mooncake", store, {"get_into": get})


@contextmanager
def hub(values: Values, settings: StoreSettings, folder: Path) -> Iterator[Contender]:
    """Measures a pack on the Hub, beside its client's own session: each file as a whole, and the digest that each byte needs
    before use.

    Raises:
        Unavailable: the client is not installed.
    """
    try:
        client = hub_client()
    except StoreError as error:
        raise Unavailable(shown(error)) from error
    write_pack(values, settings, folder / "hub")
    with start_hub_server(folder / "hub") as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        with PackStore(HubSource(REPO, endpoint=endpoint)) as store:
            urls = [client.hf_hub_url(REPO, chunk_path(key), revision=COMMIT, endpoint=endpoint) for key in values.keys]

            def get(number: int) -> None:
                content = client.get_session().get(urls[number], follow_redirects=True, timeout=SECONDS).content
                _expect(len(content), values)
                digest_of([content])

            yield Contender("pack on the Hub", store, {"get and blake3": get})


def _expect(count: int, values: Values) -> None:
    if count != values.nbytes:
        raise CakeError(f"The client brought {count} bytes of {values.nbytes}.")
