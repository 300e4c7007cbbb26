"""`cake-hf serve` with the real `openai` client: answers, refusals, faults, and clients that go away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cake_hf import StoreError
from cake_hf.stores import MemoryStore, open_store
from cake_hf.testing import FaultStore, GateStore, expected_faults
from cake_hf.transfer import telemetry
from commands import run_command, write_text
from faulty import Faulty, raising
from http_servers import Running, expected_answer, require_server, running, save_chat_model, words
from models import CHUNK
from waiting import PATIENCE, await_true

CHUNKS = 6
DOCUMENT = words(CHUNKS * CHUNK + 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_server()
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    """One server for the tests that leave it as it is; it was not asked for their documents yet."""
    with running(folder, MemoryStore()) as server:
        yield server


@pytest.fixture(scope="module")
def kept(served: Running) -> MemoryStore:
    """A store that has `DOCUMENT`."""
    served.told(DOCUMENT)
    assert served.server.manager.flush(PATIENCE)
    store: MemoryStore = served.server.manager.store
    return store


def brought(report: dict[str, Any]) -> int:
    """Chunks that were not computed."""
    return int(report["chunks_loaded"] + report["chunks_shared"])


# What is answered.


def test_an_answer_and_its_stream_are_those_of_generate(folder: Path, served: Running) -> None:
    text, seed = words(CHUNKS * CHUNK, seed=2), expected_answer(folder, words(CHUNKS * CHUNK, seed=2))
    answer, report = served.told(text)
    assert answer == seed
    assert report["chunks_computed"] == CHUNKS
    pieces = [piece for event in served.chat([text], stream=True) for piece in event.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == answer
    assert sum(bool(piece.delta.content) for piece in pieces) > 1
    assert pieces[-1].finish_reason in ("length", "stop")


def test_the_completions_and_responses_of_the_server_are_restored_too(served: Running) -> None:
    text = words(3 * CHUNK + 2, seed=3)
    first = served.client.completions.create(model=served.model, prompt=text, max_tokens=3, temperature=0)
    second = served.client.completions.create(model=served.model, prompt=text, max_tokens=3, temperature=0)
    assert first.choices[0].text == second.choices[0].text
    assert [served.report(answer.id)["chunks_computed"] for answer in (first, second)] == [3, 0]
    raw = served.client.responses.with_raw_response.create(
        model=served.model, input=text, max_output_tokens=16, temperature=0
    )
    assert served.report(raw.headers["x-request-id"])["tokens"] == 3 * CHUNK + 4


def test_an_sdk_exports_what_a_server_does(folder: Path) -> None:
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    sdk, reader = pytest.importorskip("opentelemetry.sdk.metrics"), export.InMemoryMetricReader()
    telemetry.use_meter(sdk.MeterProvider([reader]).get_meter("cake_hf"))
    try:
        with running(folder, MemoryStore()) as server:
            for _ in range(2):
                server.told(DOCUMENT)
            assert server.server.manager.flush(PATIENCE)
        told = {
            (metric.name, *point.attributes.values()): getattr(point, "value", None) or point.count
            for resource in reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }
    finally:
        telemetry.use_meter(None)
    assert told["cake_hf.requests", "restored"] == told["cake_hf.ttft",] == 2
    assert told["cake_hf.steps", "alone"] == told["cake_hf.chunks", "computed"] == CHUNKS
    assert told["cake_hf.chunks", "saved"] == told["cake_hf.chunks", "shared"] == CHUNKS


def test_a_chat_of_many_turns_computes_only_what_is_new(folder: Path, served: Running) -> None:
    said = [words(4 * CHUNK, seed=4)]
    for turn in range(4):
        before = len(" ".join(said).split())
        answer, report = served.told(*said)
        assert answer == expected_answer(folder, *said)
        assert brought(report) + report["chunks_computed"] == (report["tokens"] - 1) // CHUNK
        if turn:
            assert brought(report) >= 4
            assert report["chunks_computed"] <= 3
        assert report["tokens"] > before
        said += [answer, words(CHUNK + 3, seed=10 + turn)]


def test_concurrent_clients_get_their_own_answers(folder: Path, served: Running) -> None:
    documents = [words(size, seed=20 + size % 3) for size in (70, 71, 90, 5, 33, 70, 120, 16)]
    gate = threading.Barrier(len(documents))

    def ask(text: str) -> Any:
        gate.wait(PATIENCE)
        return served.told(text)

    with ThreadPoolExecutor(len(documents)) as clients:
        answers = list(clients.map(ask, documents))
    assert [answer for answer, _ in answers] == [expected_answer(folder, text) for text in documents]
    assert [report["tokens"] for _, report in answers] == [len(text.split()) + 2 for text in documents]


def test_sampling_of_the_first_request_holds_for_all_as_in_transformers(folder: Path, served: Running) -> None:
    first = served.server.manager
    served.chat([DOCUMENT], temperature=0, top_p=0.5)
    assert served.server.manager is first
    with running(folder, MemoryStore()) as server:
        first = server.server.manager
        server.chat([DOCUMENT], extra_body={"generation_config": '{"do_sample": true, "temperature": 0.5, "top_k": 3}'})
        chosen = server.server.manager
        assert chosen is not first
        assert chosen.generation_config.top_k == 3
        server.told(DOCUMENT)
        assert server.server.manager is chosen


# What is refused, by one sentence to the client.


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Running]:
    """A server with memory for 128 tokens."""
    with running(folder, MemoryStore(), options={"cb_num_blocks": 8}) as server:
        yield server


@pytest.mark.fault(
    "Prompt",
    "A client of `cake-hf serve` sends what the engine would not survive: an empty prompt, too long a one, an id twice.",
    "That client gets one sentence (400), or an answer that ends where memory does; the others do not notice.",
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": words(128)}, "The prompt has 128 tokens, and the engine's memory has room for 128"),
        ({"prompt": words(300)}, "The prompt has 300 tokens, and the engine's memory has room for 128"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "w5", "max_tokens": 0}, "max_tokens is at least 1; got 0"),
        ({"prompt": "w5", "max_tokens": -3}, "max_tokens is at least 1; got -3"),
    ],
)
def test_what_the_engine_would_not_survive(
    asked: dict[str, Any], message: str, stream: bool, folder: Path, small: Running
) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        small.client.completions.create(model=small.model, stream=stream, temperature=0, **asked)
    assert small.told("w5")[0] == expected_answer(folder, "w5")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [16, 100, 127])
def test_an_answer_ends_where_memory_does(tokens: int, stream: bool, folder: Path, small: Running) -> None:
    found = small.client.completions.create(
        model=small.model,
        prompt=words(tokens),
        stream=stream,
        temperature=0,
        extra_body={"generation_config": '{"max_new_tokens": 1000, "eos_token_id": -1, "do_sample": false}'},
    )
    reason = list(found)[-1].choices[0].finish_reason if stream else found.choices[0].finish_reason
    assert reason == "length"
    assert small.told("w5")[0] == expected_answer(folder, "w5")


@pytest.mark.parametrize("streams", [(False, False), (False, True), (True, False), (True, True)])
def test_an_id_that_is_under_way_is_refused(streams: tuple[bool, bool], folder: Path, kept: MemoryStore) -> None:
    import openai

    store = GateStore(kept)
    with running(folder, store, strategy="load") as server:

        def ask(stream: bool) -> str:
            found = server.chat([DOCUMENT], stream=stream, extra_headers={"x-request-id": "mine"})
            if not stream:
                return str(found.choices[0].message.content)
            return "".join(piece.delta.content or "" for event in found for piece in event.choices)

        with ThreadPoolExecutor(1) as client:
            first = client.submit(ask, streams[0])
            store.await_begun(1)
            with pytest.raises(openai.BadRequestError, match="'mine' is under way"):
                ask(streams[1])
            store.open()
            assert first.result(PATIENCE) == expected_answer(folder, DOCUMENT)
        assert ask(streams[1]) == expected_answer(folder, DOCUMENT)  # the id is free again


def test_a_report_that_is_unknown_is_not_found(served: Running) -> None:
    with pytest.raises(Exception, match="404"):
        served.report("unknown")


# Faults.


@pytest.mark.fault(
    "Stores",
    "The store of `cake-hf serve` fails, lies, or is gone.",
    "Every client gets the answer that it gets without a store; the report says what failed.",
)
@pytest.mark.parametrize("where", ["reads", "writes", "lookups"])
def test_a_broken_store_changes_no_answer(where: str, folder: Path, kept: MemoryStore) -> None:
    kinds = ("drop", "truncate", "flip", "error", "stall")
    broken: Any = {
        "reads": lambda: FaultStore(kept, {key: kinds[place % 5] for place, key in enumerate(kept.keys())}),
        "writes": lambda: FaultStore(MemoryStore(), rate=1.0, kinds=("tear",)),
        "lookups": lambda: Faulty(kept, "contains", raising(lambda: StoreError("the store is gone"))),
    }[where]()
    with expected_faults(), running(folder, broken) as server:
        answer, report = server.told(DOCUMENT)
        assert answer == expected_answer(folder, DOCUMENT)
        assert report["chunks_computed"] == CHUNKS
        other = words(2 * CHUNK, seed=41)
        assert server.told(other)[0] == expected_answer(folder, other)
        if where == "reads":
            broken.release()


@pytest.mark.fault(
    "Processes",
    "A client of `cake-hf serve` goes away while its prompt is loaded, or while its answer is streamed.",
    "Its request ends, all of its memory comes back, and the other clients are answered.",
)
@pytest.mark.parametrize("when", ["loading", "answering"])
def test_a_client_that_goes_away(when: str, folder: Path, kept: MemoryStore) -> None:
    store = GateStore(kept)
    if when == "answering":
        store.open()
    with running(folder, store, strategy="load") as server:
        stream = server.chat([DOCUMENT], stream=True, max_tokens=1500)
        if when == "answering":
            assert next(piece for event in stream for piece in event.choices if piece.delta.content)
        else:
            store.await_begun(1)
        stream.close()
        manager = server.server.manager
        scheduler = manager.batch_processor.scheduler
        await_true(lambda: not scheduler.active_requests and not scheduler.waiting_requests)
        store.open()

        def is_all_back() -> bool:
            account = manager._engine.account()
            return bool(account["tables"] == 0 and account["free"] + account["cached"] == account["all"])

        await_true(is_all_back)
        assert server.told(DOCUMENT)[0] == expected_answer(folder, DOCUMENT)


def test_the_end_saves_what_was_computed(folder: Path) -> None:
    store = MemoryStore()
    with running(folder, store) as server:
        server.told(DOCUMENT)
    assert len(list(store.keys())) == CHUNKS


def test_a_later_server_restores(folder: Path, kept: MemoryStore) -> None:
    with running(folder, kept) as server:
        answer, report = server.told(DOCUMENT)
        assert report["chunks_loaded"] + report["chunks_computed"] == CHUNKS
        assert report["chunks_missed"] == 0
    assert answer == expected_answer(folder, DOCUMENT)


def test_what_was_warmed_is_restored(folder: Path, tmp_path: Path) -> None:
    """With the chunk sizes that both have by default."""
    text, store = write_text(tmp_path / "text", 300), tmp_path / "store"
    warmed = run_command("warm", folder, text, "--store", store, "--device", "cpu")
    assert warmed.exit_code == 0, warmed.output
    with open_store(store) as opened, running(folder, opened, chunk_size=None, strategy="load") as server:
        prompt = text.read_text() + " w5 w6"
        answer = server.client.completions.create(model=server.model, prompt=prompt, max_tokens=3, temperature=0)
        report = server.report(answer.id)
    assert (report["chunk_size"], report["chunks_loaded"], report["chunks_computed"]) == (128, 2, 0)
