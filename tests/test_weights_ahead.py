"""The weights' checksum of a first prompt, made in a thread while the model runs its short forward."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xxhash

from cake_hf import CakeCache, MemoryStore, Report
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run
from waiting import PATIENCE

THREAD = "cake-weights"
IDS = prompt()


def filled_by(model: Any) -> MemoryStore:
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        run(model, IDS, cache)
        cache.flush()
    return store


def asked(model: Any, store: MemoryStore) -> Report:
    """What became of a prompt; it is right in any case."""
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as cache:
        outcome = run(model, IDS, cache)
        report = cache.report
    assert difference(outcome, oracle(model, IDS)) == ""
    return report


def in_the_first_forward(model: Any, act: Callable[[], object]) -> None:
    """Has a model act, once, before it computes anything."""
    forward, left = model.model.forward, [act]

    @functools.wraps(forward)
    def acting(*args: Any, **kwargs: Any) -> Any:
        if left:
            left.pop()()
        return forward(*args, **kwargs)

    model.model.forward = acting


def before_the_checksum(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the thread act before it makes a checksum."""
    real = xxhash.xxh3_128

    def acting() -> Any:
        if threading.current_thread().name == THREAD:
            act()
        return real()

    monkeypatch.setattr(xxhash, "xxh3_128", acting)


def join_the_thread() -> None:
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return filled_by(build("llama"))


@pytest.fixture(scope="module")
def acting_store() -> MemoryStore:
    """Of a model whose forward is wrapped like that of the models here that act in it, but does nothing more."""
    model = build("llama")
    in_the_first_forward(model, lambda: None)
    return filled_by(model)


def test_it_is_made_while_the_model_runs(acting_store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side waits for the other one: one after the other, they would wait in vain."""
    together = threading.Barrier(2, timeout=PATIENCE)
    model = build("llama")
    in_the_first_forward(model, together.wait)
    before_the_checksum(together.wait, monkeypatch)
    assert asked(model, acting_store).chunks_loaded == CHUNKS
    assert not together.broken


@pytest.mark.parametrize("changed", [True, False])
def test_weights_that_change_meanwhile_are_not_mistaken_for_the_former_ones(
    changed: bool, acting_store: MemoryStore
) -> None:
    model = build("llama")

    def change() -> None:
        join_the_thread()  # it has seen the former weights
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight[0, 0] += 0.5 * changed

    in_the_first_forward(model, change)
    assert asked(model, acting_store).chunks_loaded == (0 if changed else CHUNKS)


def test_if_the_thread_fails_it_is_made_when_it_is_needed(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fail() -> None:
        tried.append(threading.current_thread().name)
        raise RuntimeError("the weights cannot be read just now")

    before_the_checksum(fail, monkeypatch)
    assert asked(build("llama"), store).chunks_loaded == CHUNKS
    assert tried == [THREAD]


def test_without_a_thread_it_is_made_when_it_is_needed(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if thread.name == THREAD:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert asked(build("llama"), store).chunks_loaded == CHUNKS
    assert len(refused) == 1


def test_it_is_made_once(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = build("llama"), []
    before_the_checksum(lambda: made.append(THREAD), monkeypatch)
    for _ in range(2):
        assert asked(model, store).chunks_loaded == CHUNKS
    assert made == [THREAD]
