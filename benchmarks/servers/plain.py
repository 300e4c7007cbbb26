"""redis-server, moto's S3 service and a Hub with one pack, on loopback. Every wait is bounded; the caller kills the servers."""

from __future__ import annotations

import contextlib
import importlib.util
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import cake_hf
from benchmarks.children import environment
from cake_hf.errors import CakeError

PATIENCE = 60.0
"""Seconds after which a server that does not come up is given up."""

_numbers = count()


_FACELESS = """
import os, sys, types
package = types.ModuleType("cake_hf")
package.__path__ = [sys.argv.pop(1)]
sys.modules["cake_hf"] = package
"""


class Unavailable(CakeError):
    """A server cannot run on this machine; the message says why and, if that helps, what to install."""


class Server:
    """A process that listens on a port of 127.0.0.1, and its handle."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.port = port

    def kill(self) -> None:
        """Ends it at once, as a crash would. May be called twice."""
        self._process.kill()
        self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


class S3Server(Server):
    """moto's S3 service: it keeps objects in memory, and accepts any credentials."""

    @property
    def options(self) -> dict[str, str]:
        """Returns the options with which `ObjectStore` finds it."""
        secret = {"access_key_id": "test", "secret_access_key": "test"}
        return {"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1", **secret}

    def new_bucket(self) -> str:
        """Makes a bucket and returns its name."""
        name = f"bucket-{next(_numbers)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        with opener.open(request, timeout=PATIENCE):
            return name


MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.disable(logging.CRITICAL)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
"""Script that prints its port and ends when its input does: also when its parent is killed."""


def start_s3_server() -> S3Server:
    """Starts moto's S3 service on a free port.

    Raises:
        Unavailable: moto is not installed, or its server does not start.
    """
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise Unavailable('moto, an S3 server, is not installed: pip install "moto[s3,server]"')
    return S3Server(*_started([sys.executable, "-c", MOTO], "moto's server"))


def start_hub_server(folder: Path) -> Server:
    """Starts a Hub that has the pack in this folder, and nothing else; see `hub`.

    Raises:
        Unavailable: it does not start.
    """
    return Server(*_started([sys.executable, "-m", "benchmarks.servers.hub", str(folder)], "the server of packs"))


def start_redis_server(folder: Path, *options: str, port: int | None = None) -> Server:
    """Starts redis-server with nothing kept on disk.

    Args:
        folder: for its files.
        options: more of its command line.
        port: that of an earlier server; a free one by default.

    Raises:
        Unavailable: it is not installed, or does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise Unavailable("redis-server is not installed (Debian and Ubuntu: apt-get install redis-server)")
    for _ in range(5):  # Another process may take the free port first.
        chosen = port or free_port()
        command = [program, "--port", str(chosen), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", *options]
        process = subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if _answers(process, chosen):
            return Server(process, chosen)
        process.kill()
        process.wait(PATIENCE)
    raise Unavailable("redis-server did not start")


def _started(command: list[str], name: str) -> tuple[subprocess.Popen[str], int]:
    """Returns a server that prints its port, and that port."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env=environment(), text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
    line = process.stdout.readline() if ready else ""
    if not line:
        Server(process, 0).kill()
        raise Unavailable(f"{name} did not start")
    return process, int(line)


def free_port() -> int:
    """Returns a port of 127.0.0.1 on which no process listens at present."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(process: subprocess.Popen[str], port: int) -> bool:
    """Waits until the server answers a PING (it may want a password, which is an answer, too)."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            if connection.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                return True
        time.sleep(0.01)
    return False


def faceless(script: str, arguments: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """Returns the command line of a Python process that imports parts of the package without its face, which would bring in
    transformers.

    Args:
        script: finds its arguments from `sys.argv[1]` on, and `os` and `sys` imported.
        arguments: of the script.
        options: of the interpreter.
    """
    return [sys.executable, *options, "-c", _FACELESS + script, cake_hf.__path__[0], *arguments]
