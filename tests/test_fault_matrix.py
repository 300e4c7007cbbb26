"""Every kind of fault, in every store, at the first, a middle and the last chunk: the answer is the one without a cache.

A new store joins by a line in `STORES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch

from cake_hf import CakeCache, Limits, MemoryStore, Report
from cake_hf.stores import LocalStore, Store, TierStore, open_store
from cake_hf.stores.object import ObjectStore
from cake_hf.stores.redis import RedisStore
from cake_hf.testing import FAULTS, FaultStore, ThrottledStore
from hanging import no_waiting_for
from models import CHUNK, CHUNKS, Outcome, difference, expected, prompt, run, shared_model
from pack_files import write_folder
from servers import S3Server, Server
from stored import filled_store, keys_in_order
from waiting import PATIENCE, join_loaders, loaders

pytest_plugins = ["servers"]


def on_redis(path: Path, request: pytest.FixtureRequest) -> Store:
    server: Server = request.getfixturevalue("redis_server")
    return RedisStore(f"redis://127.0.0.1:{server.port}/0?prefix=matrix-{next(_numbers)}", slice_bytes=5000)


def on_s3(path: Path, request: pytest.FixtureRequest) -> Store:
    server: S3Server = request.getfixturevalue("s3_server")
    return ObjectStore(f"s3://{server.new_bucket()}/matrix", options=server.options)


STORES: dict[str, Callable[[Path, pytest.FixtureRequest], Store]] = {
    "memory": lambda path, request: MemoryStore(),
    "local": lambda path, request: LocalStore(path),
    "local with a budget": lambda path, request: LocalStore(path, budget=10**9, eviction="front-first"),
    "throttled": lambda path, request: ThrottledStore(LocalStore(path), bytes_per_second=1e12),
    "tiers": lambda path, request: TierStore([MemoryStore(), LocalStore(path)]),
    "redis": on_redis,
    "s3": on_s3,
}
"""Mooncake's are in `mooncake_suite.py`, in a network of its own; a pack, which is read-only, stands further down."""

_numbers = count()
POSITIONS = {"first": 0, "middle": CHUNKS // 2, "last": CHUNKS - 1}

MISSED, FAILED = (1, 0), (0, 1)
COUNTS = {"drop": MISSED, "truncate": FAILED, "flip": FAILED, "error": FAILED, "stall": FAILED, "tear": FAILED}
"""Chunks missed and failed, for one fault of a kind. What a lie does stands at the end."""

HEALED = {"drop", "truncate", "flip", "tear"}
"""Faults after which the store gets the chunk anew: it has lost it, or what it has is no good."""

PATIENT = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)


@cache
def chunks() -> list[tuple[str, bytes]]:
    """Keys and values of the prompt's chunks, in order."""
    store = filled_store(shared_model("llama"))
    return [(key, bytes(store.read(key) or b"")) for key in keys_in_order(store)]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store with all chunks of the prompt."""
    opened = STORES[request.param](tmp_path, request)
    for key, value in chunks():
        opened.write(key, [value])
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    join_loaders()
    assert loaders() == []


def broken(store: Store, key: str, fault: str) -> FaultStore:
    """The store with one fault. A torn write has to be written first."""
    faulty = FaultStore(store, {key: fault})
    if fault == "tear":
        store.delete(key)
        with CakeCache(shared_model("llama"), faulty, chunk_size=CHUNK, strategy="compute") as saving:
            saving.prefill(prompt(), whole=True)
            assert saving.flush(60)
            assert (saving.report.chunks_saved, saving.report.chunks_unsaved) == (0, 1)
        faulty.faults.clear()
    return faulty


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("fault", COUNTS)
def test_a_fault_changes_nothing_but_the_counts(store: Store, fault: str, position: str) -> None:
    key = chunks()[POSITIONS[position]][0]
    faulty = broken(store, key, fault)
    with CakeCache(shared_model("llama"), faulty, chunk_size=CHUNK, strategy="load", limits=PATIENT) as warm:
        with no_waiting_for(faulty):
            outcome = run(shared_model("llama"), prompt(), warm)
        report = warm.report
        assert warm.flush(60)
        assert difference(outcome, expected()) == ""
        assert faulty.injected[-1:] == [(key, fault)]
        assert (report.chunks_missed, report.chunks_failed) == COUNTS[fault]
        assert (report.chunks_loaded, report.chunks_computed) == (CHUNKS - 1, 1)
        assert report.chunks_saved == (fault in HEALED)
        if fault == "stall":  # it came back though the read never did
            release_and_look_again(faulty, warm, outcome)
    assert store.read(key) == dict(chunks())[key], "what the store has at the end is the good chunk"


def report_of_an_exact_run(faulty: FaultStore) -> Report:
    with CakeCache(shared_model("llama"), faulty, chunk_size=CHUNK, strategy="load", limits=PATIENT) as warm:
        with no_waiting_for(faulty):
            outcome = run(shared_model("llama"), prompt(), warm)
        report = warm.report
        faulty.release()
    assert difference(outcome, expected()) == ""
    return report


def release_and_look_again(faulty: FaultStore, warm: CakeCache, outcome: Outcome) -> None:
    """The late read writes garbage to where it was told to: nothing of that may be in the cache."""
    faulty.release()
    join_loaders()
    for layer, keys, values in zip(warm.layers, outcome.keys, outcome.values, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize("store", ["local"], indirect=True)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("fault", COUNTS)
def test_a_fault_changes_nothing_where_both_sides_work(store: Store, fault: str, position: str) -> None:
    """Here the faulty chunk may be computed before anybody reads it; then nothing is counted."""
    key = chunks()[POSITIONS[position]][0]
    faulty = broken(store, key, fault)
    with CakeCache(shared_model("llama"), faulty, chunk_size=CHUNK, limits=PATIENT) as warm:
        with no_waiting_for(faulty):
            outcome = run(shared_model("llama"), prompt(), warm)
        report = warm.report
        faulty.release()
    assert difference(outcome, expected()) == ""
    assert report.chunks_loaded + report.chunks_computed == CHUNKS
    assert (report.chunks_missed, report.chunks_failed) in ((0, 0), COUNTS[fault])


@pytest.mark.parametrize("store", ["local"], indirect=True)
@pytest.mark.parametrize("fault", COUNTS)
def test_all_chunks_have_the_fault(store: Store, fault: str) -> None:
    keys = [key for key, _ in chunks()]
    if fault == "tear":
        for key, value in chunks():
            store.write(key, [value[: len(value) // 2]], replace=True)
    faulty = FaultStore(store, {} if fault == "tear" else dict.fromkeys(keys, fault))
    report = report_of_an_exact_run(faulty)
    assert (report.chunks_loaded, report.chunks_computed) == (0, CHUNKS)
    # What was not even begun when the first reads were given up is no failure.
    begun = PATIENT.loader_threads if fault == "stall" else CHUNKS
    assert (report.chunks_missed, report.chunks_failed) == tuple(begun * count for count in COUNTS[fault])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("fault", [fault for fault in COUNTS if fault != "tear"])
def test_a_fault_of_a_pack_changes_nothing_but_the_counts(fault: str, position: str, tmp_path: Path) -> None:
    """It cannot be healed, since nothing can be written there."""
    key = chunks()[POSITIONS[position]][0]
    faulty = FaultStore(open_store(f"pack:{write_folder(tmp_path, dict(chunks()))}"), {key: fault})
    report = report_of_an_exact_run(faulty)
    assert (report.chunks_loaded, report.chunks_computed) == (CHUNKS - 1, 1)
    assert report.chunks_saved == 0
    assert (report.chunks_missed, report.chunks_failed) == COUNTS[fault]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_well_formed_forgery_is_loaded(store: Store, position: str) -> None:
    """The negative control, and what SECURITY.md says: a well-formed lie is used. `cake-hf verify --recompute` finds it."""
    faulty = FaultStore(store, {chunks()[POSITIONS[position]][0]: "lie"})
    with CakeCache(shared_model("llama"), faulty, chunk_size=CHUNK, strategy="load", limits=PATIENT) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        assert (warm.report.chunks_loaded, warm.report.chunks_failed) == (CHUNKS, 0)
    assert difference(outcome, expected()) != ""


def test_every_kind_of_fault_is_here() -> None:
    assert {*COUNTS, "lie"} == set(FAULTS)
