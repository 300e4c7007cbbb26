"""A Hub of our own on loopback: as much of the Hub's protocol as its real client speaks when packs are pushed and read.

Two servers, as with the real one: the endpoint (repositories, commits, small files) and a content server on another port,
to which large files are sent and from where they come. Files are kept per commit; what a commit held never changes by
itself. Every request is noted, and both servers can be made to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"
LARGE = 10 * 2**20


@dataclass(frozen=True)
class File:
    """A file in a commit: its bytes, or the sha256 of those on the content server."""

    content: bytes = b""
    oid: str = ""


@dataclass
class Repo:
    """A repository: commits by their 40 digits, and branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File]) -> str:
        """Put these files on main."""
        content = repr((len(self.commits), sorted(files), list(files.values())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.refs["main"] = sha
        return sha


@dataclass(frozen=True)
class Request:
    """One request as a server saw it."""

    server: str
    method: str
    path: str
    range: str
    authorized: bool


class Hub:
    """The state behind both servers. Start it with `running_hub`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.cut_after: int | None = None
        """Break the next answer of the content server off after so many bytes of its body."""
        self.status: int | None = None
        """Answer every request to the content server with this status."""
        self.before_content: Callable[[str], None] = lambda path: None
        """Called by the content server with the path, before it answers a GET."""
        self.ignores_ranges = False
        self.endpoint = self.content = ""

    def file(self, repo: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes."""
        found = self.files(repo, revision)[path]
        return self.objects[found.oid] if found.oid else found.content

    def files(self, repo: str, revision: str = "main") -> dict[str, File]:
        """The files of a revision."""
        known = self.repos[repo]
        return known.commits[known.refs.get(revision, revision)]

    def replace(self, repo: str, path: str, content: bytes, revision: str = "main") -> None:
        """Change a file within its commit, as a broken or lying server would."""
        found = self.files(repo, revision)[path]
        if found.oid:
            self.objects[found.oid] = content
        else:
            self.files(repo, revision)[path] = File(content)

    def gets(self, suffix: str = "") -> list[Request]:
        """GETs to the content server."""
        with self.lock:
            return [r for r in self.requests if (r.server, r.method) == ("content", "GET") and r.path.endswith(suffix)]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the body runs."""
    hub = Hub()
    servers = [_Server(hub, _Endpoint), _Server(hub, _Content)]
    hub.endpoint = f"http://127.0.0.1:{servers[0].server_port}"
    hub.content = f"http://localhost:{servers[1].server_port}"  # another host, as with the real Hub
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is no news here."""


class Refusal(Exception):
    """An answer that is an error: status, the Hub's code for it, a message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 20
    name = ""

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (the server's names)

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self._chunked_body() if chunked else self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        authorized = self.headers.get("Authorization", "") == f"Bearer {TOKEN}"
        path = unquote(parts.path)
        with self.hub.lock:
            request = Request(self.name, self.command, path, self.headers.get("Range", ""), authorized)
            self.hub.requests.append(request)
        try:
            self.answer(request)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Error-Message": refusal.message} if refusal.message else {}
            self.send(json.dumps({"error": refusal.message}).encode(), refusal.status, headers)

    def answer(self, request: Request) -> None:
        raise NotImplementedError

    def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, raw: bytes, headers: dict[str, str] | None = None) -> None:
        """A whole file, or the range that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.hub.ignores_ranges:
            self.send(raw, 200, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(raw)), len(raw) - 1)
        if start > end:
            raise Refusal(416)
        self.send(raw[start : end + 1], 206, {**(headers or {}), "Content-Range": f"bytes {start}-{end}/{len(raw)}"})

    def _chunked_body(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


class _Content(_Handler):
    """Where large files are: addressed by their sha256, and by who was given the address; it knows no tokens."""

    name = "content"

    def answer(self, request: Request) -> None:
        if self.hub.status is not None:
            raise Refusal(self.hub.status)
        oid = request.path.split("/")[2]
        if request.method == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400)
            self.hub.objects[oid] = self.body
            self.send(b"", 200, {"ETag": f'"{oid}"'})
            return
        self.hub.before_content(request.path)
        self.send_file(self.hub.objects[oid])

    def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        with self.hub.lock:
            cut, self.hub.cut_after = (
                (self.hub.cut_after, None) if self.command == "GET" else (None, self.hub.cut_after)
            )
        if cut is None:
            super().send(body, status, headers)
            return
        super().send(body[:cut], status, {**(headers or {}), "Content-Length": str(len(body))})
        self.close_connection = True


class _Endpoint(_Handler):
    """The Hub's API and the files of its repositories."""

    name = "endpoint"

    def answer(self, request: Request) -> None:
        for method, pattern, action in self.routes:
            if method == request.method and (found := re.fullmatch(pattern, request.path)):
                with self.hub.lock:
                    action(self, request, *found.groups())
                return
        raise Refusal(404, "", f"The hub of the tests has nothing for {request.method} {request.path}.")

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def create(self, request: Request) -> None:
        self._need_token(request)
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        existed = name in self.hub.repos
        if not existed:
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
            self.hub.repos[name].commit({".gitattributes": File(b"*.safetensors filter=lfs")})
        self.json({"url": f"{self.hub.endpoint}/{name}"}, 409 if existed else 200)

    def validate_yaml(self, request: Request) -> None:
        block = json.loads(self.body)["content"].split("---")[1]
        try:
            yaml.safe_load(block)
        except yaml.YAMLError as error:
            self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        else:
            self.json({"errors": [], "warnings": []})

    def info(self, request: Request, name: str, revision: str | None = None) -> None:
        repo = self._repo(request, name)
        sha = self._commit(repo, revision or "main")
        files = [{"rfilename": path} for path in repo.commits[sha]]
        self.json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": files, "tags": []})

    def tree(self, request: Request, name: str, revision: str) -> None:
        repo = self._repo(request, name)
        files = repo.commits[self._commit(repo, revision)]
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(self._bytes(file)),
                "oid": file.oid[:40] or _git_oid(file.content),
            }
            for path, file in files.items()
        ]
        self.json(entries)

    def preupload(self, request: Request, name: str, revision: str) -> None:
        self._need_token(request)
        files = self.hub.files(name, self._commit(self._repo(request, name), revision))
        answers = []
        for asked in json.loads(self.body)["files"]:
            there = files.get(asked["path"])
            large = asked["path"].endswith(".safetensors") or asked["size"] > LARGE
            oid = None if there is None else there.oid or _git_oid(there.content)
            mode = "lfs" if large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answers})

    def lfs_batch(self, request: Request, name: str) -> None:
        self._need_token(request)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                verify = f"{self.hub.endpoint}/{name}.git/info/lfs/verify"
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.content}/objects/{asked['oid']}"},
                    "verify": {"href": verify},
                }
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, request: Request, name: str) -> None:
        self._need_token(request)
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "", "no such object")
        self.json({})

    def commit(self, request: Request, name: str, revision: str) -> None:
        self._need_token(request)
        repo = self._repo(request, name)
        parent = self._commit(repo, revision)
        files = dict(repo.commits[parent])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", parent) != parent:
                raise Refusal(412, "", "A commit has happened since.")
            if entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, "", "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = File(oid=value["oid"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self.json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, request: Request, name: str, revision: str, path: str) -> None:
        repo = self._repo(request, name)
        if repo.gated:
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted.")
        sha = self._commit(repo, revision)
        file = repo.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        size, oid = str(len(self._bytes(file))), file.oid or _git_oid(file.content)
        headers = {"X-Repo-Commit": sha, "X-Linked-Size": size, "X-Linked-Etag": f'"{oid}"', "ETag": f'"{oid}"'}
        if file.oid:
            location = f"{self.hub.content}/objects/{file.oid}/{path}"
            self.send(b"", 302, {**headers, "Location": location})
        else:
            self.send_file(file.content, headers)

    routes = (
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("GET", r"/api/models/([^/]+/[^/]+)", info),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", info),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", tree),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", preupload),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", commit),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", lfs_verify),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    )

    def _need_token(self, request: Request) -> None:
        if not request.authorized:
            raise Refusal(401, "", "Invalid username or password.")

    def _repo(self, request: Request, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not request.authorized):
            raise Refusal(404 if request.authorized else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _bytes(self, file: File) -> bytes:
        return self.hub.objects[file.oid] if file.oid else file.content


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
