"""`cake-hf serve` in processes of its own: several on one store, and one that is told to end while it answers."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cake_hf.stores import open_store
from http_servers import Child, expected_answer, require_server, running, save_chat_model, words
from models import CHUNK
from servers import S3Server, Server
from waiting import PATIENCE

pytest_plugins = ["servers"]

CHUNKS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_server()
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["directory", "redis", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that two processes can open, by its URL. (A Mooncake cluster: in mooncake_suite.py.)"""
    if request.param == "directory":
        return str(tmp_path / "store")
    if request.param == "redis":
        redis: Server = request.getfixturevalue("redis_server")
        return f"redis://127.0.0.1:{redis.port}/0?prefix=serve"
    server: S3Server = request.getfixturevalue("s3_server")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.options["endpoint"])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", server.options["region"])
    return f"s3://{server.new_bucket()}/prompts"


@pytest.mark.fault(
    "Processes",
    "A server is told to end by SIGTERM or SIGINT while it answers.",
    "The answer is finished, what was computed is saved, and a server that starts later restores it; the exit code is 0.",
)
def test_servers_share_prefixes_and_a_later_one_goes_on(place: str, folder: Path) -> None:
    """Two processes on one store: each restores what the other one has computed, also when that one has ended."""
    ours, theirs, last = (words(CHUNKS * CHUNK + 5, seed=seed) for seed in (31, 32, 33))
    number = signal.SIGTERM if "://" not in place else signal.SIGINT
    child = Child(folder, place)
    try:
        with open_store(place) as store, running(folder, store) as server:
            assert child.told(theirs)[0] == expected_answer(folder, theirs)
            assert child.told(theirs, "w5", "w6")[0] == expected_answer(folder, theirs, "w5", "w6")
            assert server.told(ours)[0] == expected_answer(folder, ours)
            assert server.server.manager.flush(PATIENCE)
            _, found = child.told(ours + " w7")
            assert (found["chunks_missed"], found["chunks_failed"]) == (0, 0)
            stream = child.chat([last], stream=True, max_tokens=40)
            first = next(piece for event in stream for piece in event.choices if piece.delta.content)
            child.process.send_signal(number)
            rest = [piece for event in stream for piece in event.choices]
            assert rest[-1].finish_reason in ("length", "stop")
            assert child.process.wait(PATIENCE) == 0, "".join(child.lines)
            told = "".join([first.delta.content, *(piece.delta.content or "" for piece in rest)])
            assert told.startswith(expected_answer(folder, last))
            for text in (theirs, last):
                answer, found = server.told(text)
                assert answer == expected_answer(folder, text)
                assert (found["chunks_missed"], found["chunks_failed"]) == (0, 0)
    finally:
        child.kill()
