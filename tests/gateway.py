"""An HTTP service on loopback that a test has in hand: it passes requests on to a server, or answers them itself."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

TIMEOUT = 60.0
"""Seconds after which a server that does not answer breaks the connection."""


@dataclass(frozen=True)
class Request:
    """What a client sent; the names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def start(self) -> int | None:
        """The first byte that is asked for; None for a request that names no range."""
        found = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(found[1]) if found else None


class Answer(NamedTuple):
    """What it gets."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("ETag", '"tag"'),)
    length: int | None = None
    """Of the body that a HEAD request does not get; None for what is there."""


Forward = Callable[[], Answer]


def pass_on(request: Request, forward: Forward) -> Answer:
    return forward()


@dataclass
class Gateway:
    """The service. Each request is handled in a thread of its own, so that a handler may hold one back.

    Attributes:
        handle: gives the answer to a request; its second argument fetches the server's. It may be set at any time.
        asked: the requests so far.
        endpoint: its URL.
    """

    server: str = ""
    """The host and port that requests are passed on to."""
    handle: Callable[[Request, Forward], Answer] = pass_on
    asked: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def respond(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, body)
                gateway.asked.append(request)
                answer = gateway.handle(request, lambda: gateway.fetch(request))
                self.send_response(answer.status)
                for name, value in answer.headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = respond  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def fetch(self, request: Request) -> Answer:
        """The server's answer."""
        connection = HTTPConnection(self.server, timeout=TIMEOUT)
        try:
            connection.request(request.method, request.path, request.body or None, request.headers)
            answer = connection.getresponse()
            body = answer.read()
            ours = ("content-length", "transfer-encoding", "connection", "server", "date")
            headers = tuple((name, value) for name, value in answer.getheaders() if name.lower() not in ours)
            length = answer.getheader("Content-Length") if request.method == "HEAD" else None
            return Answer(answer.status, body, headers, None if length is None else int(length))
        finally:
            connection.close()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(TIMEOUT)
        self._server.server_close()
