"""A Hub with one pack in it: the part of the Hugging Face Hub's protocol that its client uses to read a pack.

    python -m benchmarks.servers.hub FOLDER

It listens on loopback, prints its port, and ends when its input does: also when its parent is killed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import SEEK_END
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "bench/pack"
COMMIT = hashlib.sha1(REPO.encode()).hexdigest()
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Handler(BaseHTTPRequestHandler):
    """Answers for one folder. A chunk's first answer is a redirection, as with the real Hub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self._folder = folder.resolve()
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        """Drops the line, which has no reader."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/").removeprefix("/content/")
        file = (self._folder / name).resolve()
        if path.startswith(f"/api/models/{REPO}"):
            self._send(json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": []}).encode())
        elif not file.is_relative_to(self._folder) or not file.is_file():
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(".safetensors") and not path.startswith("/content/"):
            self._send(b"", 302, {"X-Repo-Commit": COMMIT, "Location": f"/content/{name}"})
        else:
            self._send_file(file)

    def _send_file(self, file: Path) -> None:
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None:
            self._send(file.read_bytes(), 200, {"X-Repo-Commit": COMMIT})
            return
        with file.open("rb") as opened:  # no more than the range: the server's other work counts as the client's
            size = opened.seek(0, SEEK_END)
            begin, end = int(asked[1]), min(int(asked[2]) + 1, size)
            opened.seek(begin)
            self._send(opened.read(end - begin), 206, {"Content-Range": f"bytes {begin}-{end - 1}/{size}"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serves the folder named on the command line."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, Path(sys.argv[1])))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
