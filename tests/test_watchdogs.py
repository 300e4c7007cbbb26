"""What a signal handler raises in the main thread is the user's, wherever it comes out and whatever package it is from."""

from __future__ import annotations

import signal
import site
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cake_hf import CakeCache, MemoryStore, StoreError
from cake_hf.errors import is_a_fault
from cake_hf.restore import support
from cake_hf.stores import LocalStore, TierStore
from cake_hf.transfer.telemetry import _Watch
from cake_hf.util.interrupts import faults_suppressed, is_the_users
from little_memory import of_a_chunk, refusing
from models import CHUNK, build, oracle, prompt, run

IDS = prompt(2 * CHUNK + 5)
ERRORS = [RuntimeError, TimeoutError, ValueError, LookupError]


def ring(*_: object) -> None:
    signal.raise_signal(signal.SIGALRM)


def of_a_library(error: type[Exception]) -> Callable[..., None]:
    """A handler that an installed package brings, which does not count as the user's code."""
    source = "def fire(number, frame):\n    raise ERROR('too slow')\n"
    names: dict[str, Any] = {"__name__": "some_watchdog", "ERROR": error}
    exec(compile(source, f"{site.getsitepackages()[0]}/some_watchdog.py", "exec"), names)
    handler: Callable[..., None] = names["fire"]
    return handler


@contextmanager
def watched_by(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


class Bell:
    """Rings in one of a model's forwards, counted from 1, whatever runs it."""

    forward = runs = 0


class RingingNorm(LlamaRMSNorm):
    """It has nothing that changes from forward to forward: that would make another model of it each time."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        Bell.runs += 1
        if Bell.runs == Bell.forward:
            ring()
        normed: torch.Tensor = super().forward(hidden)
        return normed


def ringing_at(forward: int) -> Any:
    """A model, at the end of whose forwards the bell is."""
    model: Any = build("llama")
    model.model.norm.__class__ = RingingNorm
    Bell.forward, Bell.runs = forward, 0
    return model


def right(model: Any, store: Any, *, exact: bool = True) -> None:
    with CakeCache(model, store, chunk_size=CHUNK, exact=exact) as cache:
        assert torch.equal(run(model, IDS, cache).tokens, oracle(model, IDS).tokens)
        assert cache.report.reason in ("", "the store has none of the prompt's chunks yet")


FORWARDS = 10
"""The layout, the model's behaviour, what it looks ahead in two runs, chunks, last piece, decoded tokens."""


@pytest.mark.fault(
    "Time and bounds",
    "A watchdog's signal handler raises while the library tries a model out with short forwards of its own.",
    "Its error comes through, also from a handler of an installed package; nothing is held against the model.",
)
@pytest.mark.parametrize("forward", range(1, FORWARDS))
@pytest.mark.parametrize("exact", [True, False])
def test_an_alarm_in_any_forward_of_a_first_prompt_reaches_the_user(forward: int, exact: bool) -> None:
    model, store = ringing_at(forward), MemoryStore()
    error = ERRORS[forward % len(ERRORS)]
    with (
        watched_by(of_a_library(error)),
        CakeCache(model, store, chunk_size=CHUNK, exact=exact) as cache,
        pytest.raises(error, match="too slow"),
    ):
        run(model, IDS, cache)
    assert Bell.runs == forward
    right(model, store, exact=exact)


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this version of transformers had come out today."""
    monkeypatch.setattr("transformers.__version__", "99.0")
    monkeypatch.setattr(support, "_told", set())


@pytest.mark.fault(
    "Time and bounds",
    "A watchdog's signal handler raises while a model is tried out on a new version of transformers.",
    "Its error comes through; the model is tried again next time.",
)
@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("forward", [1, 2, 4, 6, 9, 12, 15])
def test_an_alarm_in_the_self_check_reaches_the_user(forward: int) -> None:
    model, error = ringing_at(forward), ERRORS[forward % len(ERRORS)]
    with watched_by(of_a_library(error)), pytest.raises(error, match="too slow"):
        CakeCache(model, MemoryStore(), chunk_size=CHUNK)
    assert Bell.runs == forward
    right(model, MemoryStore())


@pytest.mark.usefixtures("untested")
def test_an_alarm_while_layers_are_checked_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    for name in ("check_stand_in", "model_refusal"):
        with monkeypatch.context() as patch, watched_by(of_a_library(LookupError)):
            patch.setattr(support, name, ring)
            with pytest.raises(LookupError, match="too slow"):
                CakeCache(model, MemoryStore(), chunk_size=CHUNK)
        right(model, MemoryStore())


def test_an_alarm_while_a_chunk_is_copied_reaches_the_user() -> None:
    """Where no memory for it is a reason not to save it, and not more."""
    model = build("llama")
    with watched_by(of_a_library(RuntimeError)), CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with refusing(ring, of_a_chunk(model, CHUNK)), pytest.raises(RuntimeError, match="too slow"):
            run(model, IDS, cache)
        assert torch.equal(run(model, IDS, cache).tokens, oracle(model, IDS).tokens)


def test_a_fault_of_the_models_is_still_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The negative control."""
    monkeypatch.setattr(support, "_told", set())

    def fails(*_: object) -> None:
        raise LookupError("something has changed")

    monkeypatch.setattr(support, "check_stand_in", fails)
    with CakeCache(build("llama"), MemoryStore(), chunk_size=CHUNK) as cache:
        assert cache.passive
    assert "something has changed" in caplog.text


# Stores that are used directly.


class Ringing(MemoryStore):
    def contains(self, keys: Any) -> list[bool]:
        ring()
        return super().contains(keys)


@pytest.mark.parametrize("error", ERRORS)
def test_an_alarm_in_a_tier_reaches_the_user(error: type[Exception]) -> None:
    with watched_by(of_a_library(error)), pytest.raises(error, match="too slow"):
        TierStore([Ringing(), MemoryStore()]).contains(["0" * 40])


def test_an_alarm_in_a_directory_store_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alarm is often a TimeoutError, which is an OSError, as those of files are."""
    store = LocalStore(tmp_path)
    monkeypatch.setattr(type(store._folder), "statuses", ring)
    with watched_by(of_a_library(TimeoutError)), pytest.raises(TimeoutError, match="too slow"):
        store.contains(["0" * 40])


def test_an_alarm_while_telemetry_is_reported_reaches_the_user() -> None:
    watch = _Watch()
    watch.use(lambda: None, again=False)
    watch._instruments = object()  # type: ignore[assignment]
    with watched_by(of_a_library(ValueError)), pytest.raises(ValueError, match="too slow"):
        watch.tell(ring)


# How it is told.


def handlers(error: Exception) -> list[Any]:
    from functools import partial
    from unittest.mock import Mock

    def nested(number: int, frame: FrameType | None) -> None:
        def inner() -> None:
            raise error

        inner()

    def variadic(*args: object) -> None:
        raise error

    class Callee:
        def __call__(self, number: int, frame: FrameType | None) -> None:
            raise error

        def method(self, number: int, frame: FrameType | None) -> None:
            raise error

    def with_more(more: str, number: int, frame: FrameType | None) -> None:
        raise error

    def one_shot(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        raise error

    return [
        nested,
        variadic,
        Callee(),
        Callee().method,
        partial(with_more, "x"),
        Mock(side_effect=error),
        one_shot,
    ]


@pytest.mark.parametrize("number", range(7))
def test_an_error_of_any_kind_of_signal_handler_is_the_users(number: int) -> None:
    error = LookupError("mine")
    with watched_by(handlers(error)[number]):
        with pytest.raises(LookupError, match="mine") as caught:
            ring()
        assert is_the_users(caught.value)
        assert not is_a_fault(caught.value)


def test_an_error_that_was_made_of_it_is_the_users_too() -> None:
    def client() -> None:
        try:
            ring()
        except RuntimeError as error:
            raise StoreError("the connection broke") from error

    def careless_client() -> None:
        try:
            ring()
        except RuntimeError:
            raise StoreError("the connection broke")  # noqa: B904  # as such clients do

    with watched_by(of_a_library(RuntimeError)):
        for call in (client, careless_client):
            with pytest.raises(StoreError) as caught:
                call()
            assert is_the_users(caught.value)
        with pytest.raises(StoreError), faults_suppressed(StoreError):
            client()


def test_what_fails_while_an_earlier_alarm_is_dealt_with_is_a_fault_of_its_own() -> None:
    def ours() -> None:
        with faults_suppressed(StoreError):
            raise StoreError("down")

    with watched_by(of_a_library(RuntimeError)):
        try:
            ring()
        except RuntimeError:
            ours()


@pytest.mark.parametrize("error", [RuntimeError("x"), StoreError("x"), TimeoutError("x")])
def test_errors_from_elsewhere_are_the_stores_faults(error: Exception) -> None:
    with suppress(AssertionError), faults_suppressed(type(error)):
        raise error
    assert is_a_fault(error)
    assert not is_a_fault(KeyboardInterrupt())
