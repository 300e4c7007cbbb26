"""The audit in continuous batching: what is computed although it is stored has to be what is stored."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, Limits, MemoryStore
from cake_hf.testing import FaultStore, WrapperStore, expected_faults
from cake_hf.testing.forgery import forge, one_bit
from engine_runs import (
    CHUNKS,
    DOCUMENT,
    SHORT,
    alike,
    generated_kv,
    is_restored,
    needs_engine,
    plain_company,
    stepping,
    whole,
)
from models import build, shared_model
from stored import filled_store, keys_in_order, values_of
from waiting import PATIENCE

pytestmark = needs_engine

IDS = torch.tensor([DOCUMENT])


def forged(number: int | None = None) -> MemoryStore:
    """The document's chunks; one of them, or all, well-formed and with other values."""
    inner, store = filled_store(shared_model("llama"), IDS), MemoryStore()
    values = values_of(inner)
    for index, key in enumerate(keys_in_order(inner)):
        store.write(key, [forge(values[key], one_bit) if number in (None, index) else values[key]])
    return store


@pytest.mark.fault(
    "Model",
    "In continuous batching, a chunk is computed that is stored with other values.",
    "Nothing more is loaded or saved for the model; the request goes on plainly, with none of the loaded chunks.",
)
@pytest.mark.parametrize("number", [0, 1, 3])
def test_other_values_end_the_restore(number: int) -> None:
    model, store = build("llama", "float32"), forged(number)
    before = values_of(store)
    with stepping(model, store, strategy="compute") as steps:
        steps.add("document", DOCUMENT)
        steps.add("company", SHORT[0])
        steps.run()
        assert steps.tokens("document") == plain_company()[1]
        report: Any = steps.manager.report("document")
        assert report.reason_code == "differs-from-store"
        steps.add("again", DOCUMENT)
        steps.run()
        assert steps.tokens("again") == plain_company()[1]
        later: Any = steps.manager.report("again")
        assert (later.reason_code, later.chunks_loaded) == ("differs-from-store", 0)
        assert whole(steps)
    assert values_of(store) == before
    with CakeCache(model, store, chunk_size=report.chunk_size, strategy="load") as cache:  # it is known there, too
        cache.prefill(IDS)
        assert (cache.report.reason_code, cache.report.chunks_loaded) == ("differs-from-store", 0)


def test_loaded_chunks_of_another_model_are_not_used() -> None:
    """All chunks are another model's; the first one is damaged besides, so it is computed and compared."""
    inner = forged()
    store = FaultStore(inner, {keys_in_order(filled_store(shared_model("llama"), IDS))[0]: "flip"})
    with expected_faults(), stepping(build("llama", "float32"), store, strategy="load") as steps:
        steps.add("document", DOCUMENT)
        steps.run()
        assert steps.tokens("document") == plain_company()[1]
        report: Any = steps.manager.report("document")
        assert report.reason_code == "differs-from-store"
        assert whole(steps)


@pytest.mark.parametrize("strategy", ["load", "compute", "both"])
def test_equal_values_do_not(strategy: str) -> None:
    model, store = build("llama", "float32"), filled_store(shared_model("llama"), IDS)
    with stepping(model, store, strategy=strategy) as steps:
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        assert alike(steps.kv("document", CHUNKS), generated_kv())
        steps.run()
        report: Any = steps.manager.report("document")
        assert report.reason_code == ""


class NoHeaders(WrapperStore):
    """Headers that do not come before the gate is open."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.gate, self.asked = threading.Event(), threading.Event()

    def head(self, key: str, size: int) -> Any:
        self.asked.set()
        self.gate.wait(PATIENCE)
        return super().head(key, size)


def test_others_go_on_while_a_header_is_awaited() -> None:
    store = NoHeaders(forged(0))
    limits = Limits(read_timeout=PATIENCE)
    with stepping(build("llama", "float32"), store, strategy="compute", limits=limits) as steps:
        steps.add("document", DOCUMENT)
        steps.run(until=store.asked.is_set)
        steps.add("short", SHORT[0])
        steps.run(until=lambda: "short" in steps.answers)
        assert "document" not in steps.answers  # it may not be answered from chunks that were not compared
        store.gate.set()
        steps.run()
        assert steps.tokens("short") == plain_company()[0]
        assert steps.tokens("document") == plain_company()[1]


@pytest.mark.parametrize("end", ["cancel", "timeout"])
def test_a_header_that_never_comes_holds_nothing(end: str) -> None:
    store = NoHeaders(forged(0))
    limits = Limits(read_timeout=0.2 if end == "timeout" else PATIENCE, exit_flush_seconds=PATIENCE)
    with (
        expected_faults(),
        stepping(build("llama", "float32"), store, strategy="compute", limits=limits) as steps,
    ):
        steps.add("document", DOCUMENT)
        steps.run(until=store.asked.is_set)
        if end == "cancel":
            steps.manager.cancel_request("document")
        steps.run()
        assert whole(steps)
        if end == "timeout":
            assert steps.tokens("document") == plain_company()[1]
        store.gate.set()
