"""No fault of a store changes an answer of an engine, delays other requests, or loses memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cake_hf import Limits, MemoryStore
from cake_hf.testing import FaultStore, WrapperStore, expected_faults
from engine_runs import (
    CHUNKS,
    COMPANY,
    DOCUMENT,
    SHORT,
    alike,
    generated_kv,
    is_restored,
    needs_engine,
    plain_company,
    served,
    stepping,
    whole,
)
from models import shared_model
from stored import filled_store, keys_in_order
from waiting import PATIENCE

pytestmark = needs_engine

IDS = torch.tensor([DOCUMENT])
QUICK = Limits(read_timeout=0.05, lookup_timeout=0.05, exit_flush_seconds=PATIENCE)


def stored_document() -> MemoryStore:
    return filled_store(shared_model("llama"), IDS)


@pytest.mark.fault(
    "KV",
    "In continuous batching, a stored chunk is damaged, cut short, gone or cannot be read.",
    "It is computed, and counted as failed or missed. The answer is the same.",
)
@pytest.mark.parametrize("place", [0, 2, CHUNKS - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", ["drop", "truncate", "flip", "error"])
def test_a_chunk_that_cannot_be_used_is_computed(kind: str, place: int) -> None:
    model, inner = shared_model("llama"), stored_document()
    store = FaultStore(inner, {keys_in_order(inner)[place]: kind})
    with expected_faults(), stepping(model, store, strategy="load") as steps:
        steps.add("short", SHORT[0])
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        assert alike(steps.kv("document", CHUNKS), generated_kv())
        steps.run()
        report: Any = steps.manager.report("document")
        assert steps.tokens("document") == plain_company()[1]
        assert (report.chunks_loaded, report.chunks_computed) == (CHUNKS - 1, 1)
        assert (report.chunks_missed, report.chunks_failed) == ((1, 0) if kind == "drop" else (0, 1))
        assert whole(steps)


@pytest.mark.fault(
    "Time and bounds",
    "In continuous batching, reads of a store hang.",
    "Other requests go on. After `Limits.read_timeout` the chunks are computed; what comes later is dropped.",
)
@pytest.mark.parametrize("stuck", [(0,), (CHUNKS - 1,), range(CHUNKS)], ids=["first", "last", "all"])
@pytest.mark.parametrize("strategy", ["load", "both"])
def test_reads_that_hang(strategy: str, stuck: Any) -> None:
    model, inner = shared_model("llama"), stored_document()
    store = FaultStore(inner, dict.fromkeys([keys_in_order(inner)[place] for place in stuck], "stall"))
    with expected_faults(), stepping(model, store, strategy=strategy, limits=QUICK) as steps:
        for number, ids in enumerate(COMPANY):
            steps.add(str(number), ids)
        steps.run()
        assert [steps.tokens(str(number)) for number in range(len(COMPANY))] == plain_company()
        report: Any = steps.manager.report("1")
        assert report.restored == CHUNKS
        assert whole(steps)
        steps.add("next", SHORT[0])  # takes blocks that the reads were for
        store.release()
        steps.run()
        assert steps.tokens("next") == plain_company()[0]


@pytest.mark.fault(
    "Time and bounds",
    "In continuous batching, a store does not say what it has.",
    "Requests without stored chunks go on. After `Limits.lookup_timeout` the others are computed.",
)
def test_a_lookup_that_hangs_delays_no_other_request() -> None:
    class Mute(WrapperStore):
        def contains(self, keys: Any) -> Any:
            gate.wait(PATIENCE)
            return super().contains(keys)

    import threading

    gate, model = threading.Event(), shared_model("llama")
    with expected_faults(), stepping(model, Mute(stored_document()), limits=Limits(lookup_timeout=PATIENCE)) as steps:
        steps.manager.add_request(DOCUMENT, request_id="document")
        steps.manager.add_request(SHORT[0], request_id="short")
        steps.run(until=lambda: "short" in steps.answers)
        assert steps.tokens("short") == plain_company()[0]
        assert "document" not in steps.answers
        gate.set()
        steps.run()
        assert steps.tokens("document") == plain_company()[1]
    gate.clear()
    with expected_faults(), stepping(model, Mute(stored_document()), limits=QUICK) as steps:
        for number, ids in enumerate((DOCUMENT, COMPANY[0], DOCUMENT[1:])):
            steps.manager.add_request(ids, request_id=str(number))
        steps.run()
        gate.set()
        assert steps.tokens("0") == plain_company()[1]
        report: Any = steps.manager.report("0")
        assert "could not be asked" in report.reason


def test_a_store_that_is_gone_and_comes_back() -> None:
    model, inner = shared_model("llama"), stored_document()
    store = FaultStore(inner, rate=1.0, kinds=("error",))
    with expected_faults():
        tokens, reports = served(model, COMPANY, store, strategy="load")
    assert (tokens, reports[1].chunks_failed) == (plain_company(), CHUNKS)
    tokens, reports = served(model, COMPANY, inner, strategy="load")
    assert (tokens, reports[1].chunks_loaded) == (plain_company(), CHUNKS)
