"""An engine's memory: cancelled requests, little memory, and requests that share a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cake_hf import MemoryStore
from cake_hf.testing import GateStore, WrapperStore
from engine_runs import (
    CHUNKS,
    DOCUMENT,
    SHORT,
    Stepper,
    engine_config,
    is_restored,
    needs_engine,
    plain,
    plain_company,
    stepping,
    whole,
)
from models import CHUNK, prompt, shared_model
from stored import filled_store, keys_in_order

pytestmark = needs_engine

IDS = torch.tensor([DOCUMENT])


def engine_bytes(**options: Any) -> int:
    """The bytes that an engine takes for KV."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(page_size=CHUNK, max_batch_tokens=64, max_requests_per_batch=4, **options)
    with stepping(shared_model("llama"), MemoryStore(), engine=config) as steps:
        assert steps.processor.cache.cache_tensor.device.type == "cpu"
        return int(steps.processor.cache.cache_tensor.nbytes)


def test_by_default_an_engine_on_a_cpu_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake_hf.limits.ENGINE_BYTES", most := 16 * 2**20)
    taken = engine_bytes()
    assert most / 100 < taken < most
    assert engine_bytes(num_blocks=8192) > most
    assert engine_bytes(max_memory_percent=0.01) > most


def test_an_engine_that_needs_more_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what transformers' own engine does; here that is little, too."""
    monkeypatch.setattr("cake_hf.limits.ENGINE_BYTES", 2**16)
    monkeypatch.setattr("cake_hf.serving.seams.SHARE_ALONE", 0.01)
    assert engine_bytes() > 2**16


def stored_document() -> MemoryStore:
    return filled_store(shared_model("llama"), IDS)


# Cancelled, in each state.


def loading(steps: Stepper, store: GateStore) -> None:
    steps.add("document", DOCUMENT)
    steps.step()
    store.await_begun(1)


def looking(steps: Stepper, store: GateStore) -> None:
    steps.manager._requests.desk._open = False  # as before the engine is ready
    steps.manager.add_request(DOCUMENT, request_id="document")
    steps.step()


def waiting(steps: Stepper, store: GateStore) -> None:
    steps.add("large", prompt(CHUNK * 8, seed=5)[0].tolist(), max_new_tokens=50)
    steps.run(until=lambda: bool(steps.steps))
    steps.add("document", DOCUMENT)
    steps.step()
    assert "document" not in steps.engine.active()


def loaded_in_part(steps: Stepper, store: GateStore) -> None:
    loading(steps, store)
    store.open(2)
    store.await_reads(2)
    steps.step()


def decoding(steps: Stepper, store: GateStore) -> None:
    store.open()
    steps.add("document", DOCUMENT, max_new_tokens=50)
    steps.run(until=lambda: steps.steps[-1:] == [["document"]] and is_restored(steps))


@pytest.mark.fault(
    "Processes",
    "A request is cancelled while its prompt is being looked up, waits for memory, or is being restored.",
    "Its memory is free at once. What is still read for it is dropped, and touches no other request.",
)
@pytest.mark.parametrize(
    "state", [looking, waiting, loading, loaded_in_part, decoding], ids=lambda state: state.__name__
)
def test_cancelled_in_each_state(state: Any) -> None:
    model, store = shared_model("llama"), GateStore(stored_document())
    small, other = engine_config(blocks=12), prompt(CHUNK * 7 + 3, seed=9)[0].tolist()
    expected = plain(model, [other])
    with stepping(model, store, engine=small, strategy="load", new=5) as steps:
        state(steps, store)
        steps.manager.cancel_request("document")
        if state is waiting:
            steps.manager.cancel_request("large")
        steps.step()
        assert whole(steps)
        assert "document" not in steps.answers
        steps.manager._requests.desk.open()
        steps.add("other", other)
        steps.run(until=lambda: any("other" in step for step in steps.steps))
        store.open()  # what was read for the cancelled one comes now
        steps.run()
        assert [steps.tokens("other")] == expected
        steps.add("again", DOCUMENT)
        steps.run()
        assert steps.tokens("again") == plain_company()[1]


def test_a_front_is_cancelled_behind_its_step() -> None:
    model = shared_model("llama")
    with stepping(model, MemoryStore()) as steps:
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: len(steps.steps) == 2)
        steps.manager.cancel_request("document")
        steps.step()
        assert whole(steps)
        steps.add("again", DOCUMENT)
        steps.run()
        assert steps.tokens("again") == plain_company()[1]
        report: Any = steps.manager.report("again")
        assert report.restored == CHUNKS


# Little memory.


@pytest.mark.fault(
    "Time and bounds",
    "In continuous batching, memory is too small for all requests at once, and some start again.",
    "Requests wait for one another; none waits for ever. The answers are the same.",
)
@pytest.mark.parametrize("blocks", [10, 14, 19, 24])
@pytest.mark.parametrize("strategy", ["both", "load"])
def test_little_memory(blocks: int, strategy: str) -> None:
    model = shared_model("llama")
    prompts = [DOCUMENT, DOCUMENT[::-1], SHORT[0] * 4, DOCUMENT[:-20] + SHORT[2], SHORT[2] * 6, SHORT[1]]
    expected = plain(model, prompts, new=30, blocks=100)
    with stepping(model, stored_document(), engine=engine_config(blocks=blocks), strategy=strategy, new=30) as steps:
        for number, ids in enumerate(prompts):
            steps.manager.add_request(ids, request_id=str(number))
        steps.run()
        assert [steps.tokens(str(number)) for number in range(len(prompts))] == expected
        assert whole(steps)


def test_a_prompt_that_does_not_fit_is_refused_and_others_go_on() -> None:
    model = shared_model("llama")
    with stepping(model, MemoryStore(), engine=engine_config(blocks=4)) as steps:
        with pytest.raises(ValueError, match="room for 64"):
            steps.manager.add_request(DOCUMENT, request_id="document")
        steps.add("short", SHORT[0])
        steps.run()
        assert steps.tokens("short") == plain_company()[0]


# Requests of one prompt.


class Counting(WrapperStore):
    """Counts reads by key."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.reads: list[str] = []

    def read_into(self, key: str, parts: Any) -> int | None:
        self.reads.append(key)
        return super().read_into(key, parts)


@pytest.mark.parametrize("others", [[DOCUMENT], [DOCUMENT[:-3] + SHORT[0], DOCUMENT[: CHUNK * 3 + 2]]])
def test_requests_of_one_prefix_read_each_chunk_once(others: list[list[int]]) -> None:
    model, store = shared_model("llama"), Counting(stored_document())
    prompts = [DOCUMENT, *others]
    expected = plain(model, prompts)
    with stepping(model, store, strategy="load") as steps:
        for number, ids in enumerate(prompts):
            steps.add(str(number), ids)
        steps.run()
        assert [steps.tokens(str(number)) for number in range(len(prompts))] == expected
        reports: list[Any] = [steps.manager.report(str(number)) for number in range(len(prompts))]
    assert sorted(store.reads) == sorted(keys_in_order(store.inner))
    assert [report.chunks_loaded for report in reports] == [CHUNKS] + [0] * len(others)
    assert [report.chunks_shared for report in reports[1:]] == [(len(ids) - 1) // CHUNK for ids in others]


def test_a_request_that_waited_for_a_cancelled_one_restores_by_itself() -> None:
    model, store = shared_model("llama"), GateStore(stored_document())
    with stepping(model, store, strategy="load") as steps:
        steps.add("first", DOCUMENT)
        steps.add("second", DOCUMENT)
        steps.step()
        assert "second" not in steps.engine.active()
        steps.manager.cancel_request("first")
        store.open()
        steps.run()
        report: Any = steps.manager.report("second")
        assert report.chunks_loaded + report.chunks_shared == CHUNKS
        assert steps.tokens("second") == plain_company()[1]


# What the engine would not survive.


@pytest.mark.fault(
    "Prompt",
    "In continuous batching, an answer may be longer than the engine's memory.",
    "It ends where the memory does. Other requests do not notice.",
)
@pytest.mark.parametrize("new", [1000, CHUNK * 2 - 3, None])
def test_an_answer_that_outgrows_memory(new: int | None) -> None:
    room, ids = CHUNK * 8, prompt(CHUNK * 6 + 3, seed=7)[0].tolist()
    with stepping(shared_model("llama"), MemoryStore(), engine=engine_config(blocks=8), new=new or 10**6) as steps:
        steps.add("long", ids, **({} if new is None else {"max_new_tokens": new}))
        steps.add("short", SHORT[0], max_new_tokens=5)
        steps.run()
        assert len(steps.tokens("long")) == room - len(ids)
        assert steps.tokens("short") == plain_company()[0]
        assert whole(steps)


def test_a_prompt_without_room_fails_by_itself() -> None:
    """Also one that comes before the size of the memory is known, which `add_request` cannot refuse."""
    ids = prompt(CHUNK * 8, seed=7)[0].tolist()
    with stepping(shared_model("llama"), MemoryStore(), engine=engine_config(blocks=8)) as steps:
        with pytest.raises(ValueError, match="the engine's memory has room for"):
            steps.add("refused", ids)
        super(type(steps.manager), steps.manager).add_request(ids, request_id="late")
        steps.add("short", SHORT[0])
        steps.run()
        assert "the engine's memory has room for" in str(steps.answers["late"].error)
        assert steps.tokens("short") == plain_company()[0]
        assert whole(steps)


@pytest.mark.fault(
    "Prompt",
    "In continuous batching, a prompt has token ids that the model does not have.",
    "`add_request` refuses it. Other requests do not notice.",
)
@pytest.mark.parametrize("stranger", [-1, 128, 10**12])
@pytest.mark.parametrize("place", [0, CHUNK + 2, -1])
def test_ids_that_the_model_does_not_have(stranger: int, place: int) -> None:
    ids = list(DOCUMENT)
    ids[place] = stranger
    with stepping(shared_model("llama"), MemoryStore()) as steps:
        with pytest.raises(ValueError, match="has a token id that the model does not have; ids are from 0 to 127"):
            steps.add("document", ids)
        steps.add("document", DOCUMENT)
        steps.run()
        assert steps.tokens("document") == plain_company()[1]
