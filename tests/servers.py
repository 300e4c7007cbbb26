"""Real servers on loopback, each in a process of its own, and a relay that a test can cut. PYTEST_DONT_REWRITE

A test module that wants them says `pytest_plugins = ["servers"]`. Where a server is not installed its tests are skipped, unless
CAKE_HF_REQUIRE_SERVERS=1 asks for a failure.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks import servers
from benchmarks.servers import S3Server, Server, Unavailable, free_port

__all__ = ["Relay", "S3Server", "Server", "free_port", "start_redis_server", "start_s3_server"]

PATIENCE = 60.0
"""Seconds after which a server that does not answer a relay fails the test."""

Kind = TypeVar("Kind", bound=Server)


def start_s3_server() -> S3Server:
    """Start moto's S3 service on a free port. The caller kills it."""
    return _or_skip(servers.start_s3_server)


def start_redis_server(folder: Path, *options: str, port: int | None = None) -> Server:
    """Start redis-server with nothing kept on disk. The caller kills it."""
    return _or_skip(lambda: servers.start_redis_server(folder, *options, port=port))


def _or_skip(start: Callable[[], Kind]) -> Kind:
    try:
        return start()
    except Unavailable as error:
        missing(str(error))
        raise


def missing(what: str) -> None:
    """Skip the test for want of a server, or fail it where all of them have to be there."""
    if os.environ.get("CAKE_HF_REQUIRE_SERVERS") == "1":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = start_s3_server()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_redis_server(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


class Relay:
    """Stands between a client and a server on loopback, and hands everything on until it is told otherwise.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._lock = threading.Lock()
        self._left = {"server": math.inf, "client": math.inf}
        self._at_the_end: Callable[[], None] | None = None
        self.heard: Callable[[bytes], None] = lambda data: None
        """Called with what a client sends, before it is handed on. It may be set at any time."""
        self._sockets: list[socket.socket] = []
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.spent = threading.Event()
        """Set when a side has sent as many bytes as it may, and wanted to send more."""
        threading.Thread(target=self._accept, daemon=True).start()

    def limit(self, nbytes: int, then: Callable[[], None] | None = None, *, side: str = "server") -> None:
        """Let so many more bytes of a side's through.

        Args:
            nbytes: of all connections together.
            then: called when there are more; None for silence: the connections stay open and nothing comes.
            side: "server" or "client", whichever sends them.
        """
        with self._lock:
            self._left[side], self._at_the_end = nbytes, then
            self.spent.clear()

    def cut(self) -> None:
        """Break off all connections. New ones may be made."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
            self._left = dict.fromkeys(self._left, math.inf)
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        """Break off everything, and listen no more."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port), timeout=PATIENCE)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                self._join(client, server)

    def _join(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self._sockets += [client, server]
        threading.Thread(target=self._pump, args=(client, server, "client"), daemon=True).start()
        threading.Thread(target=self._pump, args=(server, client, "server"), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, side: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if side == "client":
                    self.heard(data)
                share = self._take(len(data), side)
                target.sendall(data[:share])
                if share < len(data):
                    self._run_out()
                    return
            target.shutdown(socket.SHUT_WR)

    def _take(self, wanted: int, side: str) -> int:
        with self._lock:
            share = int(min(wanted, self._left[side]))
            self._left[side] -= share
            return share

    def _run_out(self) -> None:
        self.spent.set()
        if self._at_the_end is None:
            self._closed.wait()
        else:
            self._at_the_end()


@pytest.fixture
def relay_to() -> Iterator[Callable[[int], Relay]]:
    """Makes relays to a port; they are closed behind the test."""
    made: list[Relay] = []

    def make(port: int) -> Relay:
        made.append(Relay(port))
        return made[-1]

    yield make
    for relay in made:
        relay.close()
