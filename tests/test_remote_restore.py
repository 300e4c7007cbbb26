"""Prompts restored from servers on loopback, and from servers that go away: the result never differs, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cake_hf import CakeCache, Limits
from cake_hf.stores import Store
from cake_hf.stores.object import ObjectStore
from cake_hf.stores.redis import RedisStore
from hanging import no_waiting_when
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from servers import Relay, S3Server, Server, start_redis_server, start_s3_server
from waiting import PATIENCE, join_loaders

pytest_plugins = ["servers"]

PATIENT = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)
HALF = 70_000
"""Bytes that a server sends until about half of the prompt's chunks have arrived."""


class Place:
    """A server behind a relay, and how to find it."""

    def __init__(self, server: Server, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        self.relay = relay
        self.server = server
        self._options: dict[str, Any] = {}
        if isinstance(server, S3Server):
            self.url = f"s3://{server.new_bucket()}/prompts"
            self._options = {"options": {**server.options, "endpoint": f"http://127.0.0.1:{relay.port}"}}
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        else:
            self.url = f"redis://127.0.0.1:{relay.port}/0?prefix=prompts-{relay.port}"

    def open(self, timeout: float) -> Store:
        """A store that gives up sooner than one opened by its URL."""
        kind: Callable[..., Store] = ObjectStore if isinstance(self.server, S3Server) else RedisStore
        return kind(self.url, timeout=timeout, **self._options)


@pytest.fixture(params=["s3", "redis"])
def place(
    request: pytest.FixtureRequest, relay_to: Callable[[int], Relay], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A server that all tests share, which stays; only the relay to it may go."""
    server: Server = request.getfixturevalue(f"{request.param}_server")
    yield Place(server, relay_to(server.port), monkeypatch)
    join_loaders()


@pytest.fixture(params=["s3", "redis"])
def mortal_place(
    request: pytest.FixtureRequest, tmp_path: Path, relay_to: Callable[[int], Relay], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A server of the test's own, to be killed."""
    server = start_s3_server() if request.param == "s3" else start_redis_server(tmp_path)
    yield Place(server, relay_to(server.port), monkeypatch)
    server.kill()
    join_loaders()


def fill(place: Place) -> None:
    with CakeCache(shared_model("llama"), place.url, chunk_size=CHUNK) as saving:
        saving.prefill(prompt(), whole=True)
        assert saving.flush(PATIENCE)
        assert saving.report.chunks_saved == CHUNKS


def test_a_prompt_is_restored_bit_for_bit(place: Place) -> None:
    fill(place)
    with CakeCache(shared_model("llama"), place.url, chunk_size=CHUNK, strategy="load", limits=PATIENT) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        assert (warm.report.chunks_loaded, warm.report.chunks_computed) == (CHUNKS, 0)
    assert difference(outcome, expected()) == ""


def test_both_ends_meet_over_the_network(place: Place) -> None:
    fill(place)
    with CakeCache(shared_model("llama"), place.url, chunk_size=CHUNK, limits=PATIENT) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.report.chunks_loaded + warm.report.chunks_computed == CHUNKS
    assert difference(outcome, expected()) == ""


def test_a_server_killed_before_the_prompt_is_done_without(mortal_place: Place) -> None:
    fill(mortal_place)
    limits = Limits(read_timeout=PATIENCE, lookup_timeout=PATIENCE, exit_flush_seconds=PATIENCE)
    with CakeCache(shared_model("llama"), mortal_place.url, chunk_size=CHUNK, limits=limits) as warm:
        mortal_place.server.kill()
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.flush(PATIENCE)
        report = warm.report
    assert difference(outcome, expected()) == ""
    assert (report.chunks_loaded, report.chunks_computed) == (0, CHUNKS)
    assert (report.chunks_saved, report.chunks_unsaved) == (0, CHUNKS)
    assert report.reason_code == "store-not-asked"
    assert report.prefill_seconds < PATIENCE


def test_a_server_killed_in_mid_restore_is_done_without(mortal_place: Place) -> None:
    fill(mortal_place)
    relay = mortal_place.relay

    def die() -> None:
        mortal_place.server.kill()
        relay.close()

    store = mortal_place.open(timeout=PATIENCE)
    with (
        store,
        CakeCache(shared_model("llama"), store, chunk_size=CHUNK, strategy="load", save=False, limits=PATIENT) as warm,
    ):
        relay.limit(HALF, then=die)
        outcome = run(shared_model("llama"), prompt(), warm)
        report = warm.report
    assert relay.spent.is_set()
    assert difference(outcome, expected()) == ""
    assert report.chunks_loaded + report.chunks_computed == CHUNKS
    assert report.chunks_loaded > 0
    assert report.chunks_failed > 0


def test_a_server_that_falls_silent_in_mid_restore_is_done_without(place: Place) -> None:
    fill(place)
    store = place.open(timeout=1.0)
    with (
        store,
        CakeCache(shared_model("llama"), store, chunk_size=CHUNK, strategy="load", save=False, limits=PATIENT) as warm,
    ):
        place.relay.limit(HALF)
        with no_waiting_when(place.relay.spent.is_set):
            outcome = run(shared_model("llama"), prompt(), warm)
        report = warm.report
        assert difference(outcome, expected()) == ""
        assert report.chunks_loaded + report.chunks_computed == CHUNKS
        assert report.chunks_failed > 0
        join_loaders()
