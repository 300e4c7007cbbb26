"""`cake-hf serve` with the real `openai` client: answers, restarts, faults, and clients that go away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cake_hf.errors import StoreError
from cake_hf.stores import MemoryStore, open_store
from cake_hf.testing import FaultStore, GateStore, expected_faults
from faulty import Faulty, raising
from http_servers import Child, Running, expected_answer, require_server, running, save_chat_model, words
from models import CHUNK
from servers import S3Server
from waiting import PATIENCE, await_true

pytest_plugins = ["servers"]

CHUNKS = 6
DOCUMENT = words(CHUNKS * CHUNK + 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_server()
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    """One server for the tests that leave it as it is; nobody has asked it for a document of theirs."""
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


def test_sampling_of_the_first_request_holds_for_all_as_in_transformers(folder: Path) -> None:
    with running(folder, MemoryStore()) as server:
        first = server.server.manager
        server.chat([DOCUMENT], temperature=0, top_p=0.5)
        assert server.server.manager is first
    with running(folder, MemoryStore()) as server:
        first = server.server.manager
        server.chat([DOCUMENT], extra_body={"generation_config": '{"do_sample": true, "temperature": 0.5, "top_k": 3}'})
        chosen = server.server.manager
        assert chosen is not first
        assert chosen.generation_config.top_k == 3
        server.told(DOCUMENT)
        assert server.server.manager is chosen


# What is refused, by one sentence to the client.


def test_a_prompt_that_memory_cannot_hold_is_the_clients_error(folder: Path) -> None:
    import openai

    with running(folder, MemoryStore(), options={"cb_num_blocks": 8}) as server:
        for options in ({}, {"stream": True}):
            with pytest.raises(
                openai.BadRequestError, match="The prompt has 130 tokens, and the engine's memory has room"
            ):
                server.chat([words(128)], **options)
        assert server.told(words(20))[0] == expected_answer(folder, words(20))


def test_an_id_that_is_under_way_is_refused_and_a_report_that_is_unknown_is_not_found(
    folder: Path, kept: MemoryStore
) -> None:
    import openai

    store = GateStore(kept)
    with running(folder, store, strategy="load") as server:
        mine = {"x-request-id": "mine"}
        with ThreadPoolExecutor(1) as client:
            first = client.submit(lambda: server.chat([DOCUMENT], extra_headers=mine).choices[0].message.content)
            store.await_begun(1)
            with pytest.raises(openai.BadRequestError, match="'mine' is under way"):
                server.chat([DOCUMENT], stream=True, extra_headers=mine)
            store.open()
            assert first.result(PATIENCE) == expected_answer(folder, DOCUMENT)
        with pytest.raises(Exception, match="404"):
            server.report("nobody's")


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


# Its end, and several processes.


def test_the_end_saves_what_was_computed(folder: Path) -> None:
    store = MemoryStore()
    with running(folder, store) as server:
        server.told(DOCUMENT)
    assert len(list(store.keys())) == CHUNKS
    with running(folder, store) as server:
        answer, report = server.told(DOCUMENT)
        assert report["chunks_loaded"] + report["chunks_computed"] == CHUNKS
        assert report["chunks_missed"] == 0
    assert answer == expected_answer(folder, DOCUMENT)


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that two processes can open, by its URL."""
    if request.param == "directory":
        return str(tmp_path / "store")
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
        with contextlib.suppress(ProcessLookupError):
            child.kill()
