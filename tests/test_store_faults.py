"""Each method of a store goes wrong in every way, from the first call on or later: prompts get the right tokens all the same.

What a store raises, hangs at or returns stays where it belongs, and no wait is longer than `Limits` say.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cake_hf import MemoryStore, StoreError
from cake_hf.stores import Store, TierStore
from faulty import METHODS, Faulty, hanging, our_threads, raising
from models import CHUNKS, shared_model
from store_runs import MOST_THREADS, PATIENT, QUICK, RAISED, is_right, opened, prompts_go_well
from stored import filled_store
from waiting import PATIENCE, join_loaders


@pytest.fixture(autouse=True)
def no_loader_stays() -> Iterator[None]:
    yield
    join_loaders()


@pytest.mark.fault(
    "Stores",
    "A store raises in any method: an error, a panic of native code, an interrupt, `SystemExit`.",
    "That chunk is computed or not saved, that question counts as failed; the next prompt asks again.",
)
@pytest.mark.parametrize(
    ("method", "error", "first"),
    [
        *((method, "panic", 0) for method in METHODS),
        *((method, "odd", 1) for method in METHODS),
        *((method, error, 0) for method in ("contains", "read_gradually") for error in RAISED),
    ],
)
def test_whatever_a_store_raises_stays_with_it(method: str, error: str, first: int) -> None:
    inner = filled_store(shared_model("llama"))
    store = Faulty(inner, method, raising(RAISED[error]), first)
    if method == "check_writable" and not first:
        with pytest.raises(StoreError):
            opened(store)
        return
    prompts_go_well(store, PATIENT)
    store.fault = None
    with opened(store, strategy="load", limits=PATIENT) as cache:
        assert is_right(cache)
        assert cache.report.chunks_loaded == CHUNKS
        assert cache.flush(PATIENCE)


@pytest.mark.parametrize("error", RAISED)
def test_a_writer_outlives_what_a_store_raises(error: str) -> None:
    store = Faulty(MemoryStore(), "write", raising(RAISED[error]))
    with opened(store, limits=PATIENT) as cache:
        assert is_right(cache)
        assert cache.flush(PATIENCE)
        assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (0, CHUNKS)
        store.fault = None
        cache.reset()
        assert is_right(cache)
        assert cache.flush(PATIENCE)
        assert cache.report.chunks_saved == CHUNKS


@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize("error", ["StoreError", "panic"])
@pytest.mark.parametrize("method", ["contains", "read_into", "write"])
def test_what_one_tier_raises_is_no_matter_to_the_others(method: str, error: str, where: str) -> None:
    good, bad = filled_store(shared_model("llama")), Faulty(MemoryStore(), method, raising(RAISED[error]))
    store = TierStore([bad, good] if where == "near" else [good, bad])
    for _ in range(2):
        with opened(store, strategy="load", limits=PATIENT) as cache:
            assert is_right(cache)
            assert cache.report.chunks_loaded == CHUNKS
            assert cache.flush(PATIENCE)
    assert store.flush(PATIENCE)


NONSENSE: list[Any] = [None, True, False, 0, -1, 10**6, "yes", b"", [], [True], ["no"] * 500, object(), 1.5, np.ones(3)]


@pytest.mark.fault(
    "Stores", "A method of a store returns nonsense.", "What was not checked is not used; the chunk is computed."
)
@pytest.mark.parametrize(
    ("method", "values"),
    [
        *((method, values) for method in METHODS for values in ([None], NONSENSE)),
        *(("contains", [value]) for value in NONSENSE),
    ],
)
def test_nonsense_of_a_store_changes_no_token(method: str, values: list[Any]) -> None:
    each = itertools.cycle(values)
    store = Faulty(filled_store(shared_model("llama")), method, lambda method: next(each))
    prompts_go_well(store, PATIENT)


class Overconfident(MemoryStore):
    """Says of parts that they are there, or not, as it likes; and what it has is wrong."""

    def __init__(self, inner: Store, said: Callable[[int], list[Any]]) -> None:
        super().__init__()
        self.said = said
        for key in inner.keys():  # noqa: SIM118  # a store is no mapping
            value = inner.read(key) or bytearray()
            value[-1] ^= 1
            self.write(key, [value])

    def read_gradually(self, key: str, parts: Any, arrived: Callable[[int], None]) -> int | None:
        count = self.read_into(key, parts)
        for number in self.said(len(parts)):
            try:
                arrived(number)
            except Exception:  # its author thinks that nothing can go wrong there
                continue
        return count


@pytest.mark.parametrize(
    "said", [lambda n: [], lambda n: [n], lambda n: [1], lambda n: [n + 5, -3, 0], lambda n: [n, n], lambda n: ["all"]]
)
def test_a_store_that_says_nothing_of_what_came_is_checked_all_the_same(said: Callable[[int], list[Any]]) -> None:
    store = Overconfident(filled_store(shared_model("llama")), said)
    with opened(store, strategy="load", limits=PATIENT, save=False) as cache:
        assert is_right(cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (0, CHUNKS)


@pytest.mark.fault(
    "Time and bounds",
    "A store hangs in any method, from the start or later.",
    "Each question is given up after its limit, and not asked again while it hangs; prompts are computed.",
)
@pytest.mark.parametrize(
    ("method", "first"),
    [*((method, 0) for method in METHODS), ("contains", 1), ("read_gradually", 1), ("write", 1)],
)
def test_a_hang_in_any_method_costs_its_limit_and_few_threads(method: str, first: int) -> None:
    before = len(our_threads())
    with hanging() as hang:
        store = Faulty(filled_store(shared_model("llama")), method, hang, first)
        begin = time.monotonic()
        for _ in range(3):
            with opened(store, strategy="load", limits=QUICK) as cache:
                assert is_right(cache)
                cache.flush(0.1)
            if method in ("read_into", "read_range", "read_gradually"):
                store.inner = filled_store(shared_model("llama"))
        assert time.monotonic() - begin < PATIENCE / 2  # far from where `Hang` itself ends
        assert len(our_threads()) <= before + MOST_THREADS
    join_loaders()
