"""Costs are learnt while prompts go by, remembered, and used; a bad note about them does no harm."""

from __future__ import annotations

import errno
import gc
import json
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, Limits, LocalStore, MemoryStore, Store
from cake_hf.report import Span
from cake_hf.restore import bound_store
from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.pace import Pace
from cake_hf.transfer import cost_notes as cost_memory
from cake_hf.transfer.cost_notes import CostMemory, flush_notes, note_of, recall_costs
from models import CHUNK, CHUNKS, difference, oracle, prompt, run, shared_model
from stored import filled_store
from waiting import PATIENCE, await_true

STEPS = [(index, 5.0) for index in range(4)]
LOADED = [Span("load-0", 7 - index, float(index), index + 1.0, "loaded") for index in range(4)]


def saw(*steps: tuple[int, float]) -> Pace:
    """The pace of a restore that has computed these chunks in so many seconds each."""
    pace = Pace(Costs())
    for chunk, seconds in steps:
        pace.saw_forward(chunk, seconds)
    return pace


@pytest.fixture
def model() -> torch.nn.Module:
    return shared_model("llama")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may be slow."""
    monkeypatch.setattr(cost_memory, "NOTE_SECONDS", PATIENCE)


def notes(root: Path) -> list[Path]:
    assert flush_notes(PATIENCE)
    return sorted((root / "notes").glob("*"))


def test_what_was_learnt_is_remembered_beside_the_store(tmp_path: Path) -> None:
    memory = recall_costs(LocalStore(tmp_path), "ns", "cpu")
    assert memory.costs(100).compute is None
    memory.learn(saw(*STEPS), LOADED, chunk_bytes=100)
    again = recall_costs(LocalStore(tmp_path), "ns", "cpu").costs(100)
    assert again.compute is not None
    assert again.load is not None
    assert again.compute.seconds(0) == pytest.approx(5.0)
    assert again.load.interval == pytest.approx(1.0)
    for other in (
        recall_costs(LocalStore(tmp_path), "other", "cpu"),
        recall_costs(LocalStore(tmp_path), "ns", "cuda:0"),
    ):
        assert other.costs(100).compute is None


def test_a_store_without_a_folder_remembers_as_long_as_it_lives() -> None:
    store = MemoryStore()
    recall_costs(store, "ns", "cpu").learn(saw(*STEPS), [], 100)
    assert recall_costs(store, "ns", "cpu").costs(100).compute is not None
    assert recall_costs(MemoryStore(), "ns", "cpu").costs(100).compute is None


def test_overtaken_loads_are_learnt_from_where_there_are_no_others() -> None:
    overtaken = Span("load-1", 0, 0.0, 90.0, "superseded")
    memory = CostMemory(None)
    memory.learn(saw(), [*LOADED, overtaken], 100)
    load = memory.costs(100).load
    assert load is not None
    assert load.seconds == pytest.approx(1.0)
    memory = CostMemory(None)
    memory.learn(saw(), [overtaken], 100)
    load = memory.costs(100).load
    assert load is not None
    assert load.seconds == pytest.approx(90.0)


def test_forwards_that_were_left_are_learnt_from_but_for_the_first_cold_one() -> None:
    memory, pace = CostMemory(None), Pace(Costs(), first=3)
    pace.saw_forward(0, 30.0, 0.5)
    memory.learn(pace, [], 100)
    pace = Pace(Costs(), first=3)
    pace.saw_forward(0, 1.75, 0.25)
    memory.learn(pace, [], 100)
    compute = memory.costs(100).compute
    assert compute is not None
    assert compute.seconds(3) == pytest.approx(7.0)


def test_a_chunk_counts_once_whether_its_first_layers_were_measured_or_not() -> None:
    pace = Pace(Costs())
    pace.saw_forward(1, 2.0, 0.1)
    pace.saw_forward(1, 9.0)
    assert pace.steps == [(1, 9.0)]


def test_the_tail_and_failed_loads_are_not_learnt_from() -> None:
    memory = CostMemory(None)
    spans = [Span("compute", -1, 0, 9, "computed"), Span("load-0", 2, 0, 9, "corrupt")]
    memory.learn(saw(), spans, 100)
    assert memory.costs(100).compute is None
    assert memory.costs(100).load is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'{"format": "somebody else\'s"}', b'{"a": ' * 9999, b"9" * 2**21]
)
def test_a_damaged_note_is_ignored_and_rewritten(tmp_path: Path, content: bytes) -> None:
    recall_costs(LocalStore(tmp_path), "ns", "cpu").learn(saw(*STEPS), [], 100)
    (note,) = notes(tmp_path)
    note.write_bytes(content)
    memory = recall_costs(LocalStore(tmp_path), "ns", "cpu")
    assert memory.costs(100).compute is None
    memory.learn(saw(*STEPS), [], 100)
    assert notes(tmp_path) == [note]
    assert json.loads(note.read_text())["steps"]


def test_where_nothing_can_be_written_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("os.replace", refuse)
    recall_costs(LocalStore(tmp_path), "ns", "cpu").learn(saw(*STEPS), [], 100)
    assert notes(tmp_path) == []


class Gate:
    """What is called waits here."""

    def __init__(self) -> None:
        self.calls = 0
        self.opened = threading.Event()

    def __call__(self, *_: object, **__: object) -> None:
        self.calls += 1
        assert self.opened.wait(PATIENCE)


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Who reads the note waits, as on a mount that is gone, until this is set."""
    recall_costs(LocalStore(tmp_path), "ns", "cpu").learn(saw(*STEPS), [], 100)
    (note,) = notes(tmp_path)
    gate, os_open = threading.Event(), os.open

    def wait(path: Any, *arguments: Any, **options: Any) -> int:
        if path == note.name:
            assert gate.wait(PATIENCE)
            raise OSError(errno.EIO, "gone")
        return os_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", wait)
    yield gate
    gate.set()


def test_a_note_that_hangs_costs_one_thread_and_stops_nothing(tmp_path: Path, hung: threading.Event) -> None:
    readers = {thread for thread in threading.enumerate() if thread.name == "cake-notes"}
    for _ in range(3):  # each time for another store object, as for another cache
        found = recall_costs(LocalStore(tmp_path), "ns", "cpu", Limits(lookup_timeout=0.01))
        assert found.costs(100).compute is None
    hanging = {thread for thread in threading.enumerate() if thread.name == "cake-notes"} - readers
    assert len(hanging) == 1
    hung.set()
    for thread in hanging:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_no_other_thread_waits_for_a_note_that_hangs(tmp_path: Path, hung: threading.Event) -> None:
    waiting = threading.Thread(target=lambda: recall_costs(LocalStore(tmp_path), "ns", "cpu"), daemon=True)
    waiting.start()
    await_true(lambda: any(thread.name == "cake-notes" for thread in threading.enumerate()))
    others: list[CostMemory] = []
    other = threading.Thread(target=lambda: others.append(recall_costs(MemoryStore(), "ns", "cpu")), daemon=True)
    other.start()
    other.join(PATIENCE / 2)
    assert others
    hung.set()
    waiting.join(PATIENCE)
    assert not waiting.is_alive()


def test_what_is_learnt_is_written_in_the_background_and_the_last_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, replace = Gate(), os.replace
    monkeypatch.setattr("os.replace", lambda *names, **at: (gate(), replace(*names, **at)))
    memory = recall_costs(LocalStore(tmp_path), "ns", "cpu")
    for _ in range(5):  # would hang here if it were waited for
        memory.learn(saw(*STEPS), [], 100)
    memory.learn(saw(), LOADED, 100)
    await_true(lambda: gate.calls == 1)
    assert not flush_notes(0.0)
    assert recall_costs(LocalStore(tmp_path), "ns", "cpu").costs(100).load is not None  # though no file has it yet
    gate.opened.set()
    (note,) = notes(tmp_path)
    assert gate.calls <= 3
    written = json.loads(note.read_text())
    assert written == json.loads(memory._learner.to_json(written["written"]))
    assert note_of(note).read() == note.read_text()


def test_a_cache_that_is_closed_leaves_no_note_to_be_written(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory may be a temporary one, which cannot be removed while files appear in it."""
    gate, write, flush = threading.Event(), cost_memory._write, bound_store.flush_costs

    def write_late(file: Path, text: str) -> None:
        assert gate.wait(PATIENCE)
        write(file, text)

    def open_and_flush(store: Store, seconds: float) -> bool:
        gate.set()
        return flush(store, seconds)

    monkeypatch.setattr(cost_memory, "_write", write_late)
    monkeypatch.setattr(bound_store, "flush_costs", open_and_flush)
    try:
        with CakeCache(model, tmp_path, chunk_size=CHUNK) as cache:
            cache.prefill(prompt())
        assert list((tmp_path / "notes").glob("*.json"))
    finally:
        gate.set()


def test_prompts_teach_and_notes_are_no_chunks(model: torch.nn.Module, tmp_path: Path) -> None:
    for _ in range(2):
        with CakeCache(model, tmp_path, chunk_size=CHUNK, strategy="load") as cache:
            run(model, prompt(), cache)
            costs = cache._session.cost_memory(cache._session.bound_model.namespace()).costs(1)
    assert costs.compute is not None
    assert costs.load is not None
    assert len(list(LocalStore(tmp_path).keys())) == CHUNKS


def test_no_compute_step_is_begun_if_the_loads_will_be_there_first(model: torch.nn.Module) -> None:
    """As learnt, a step takes hours and a load no time: the main thread leaves all to the loaders."""
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as saving:
        saving.prefill(prompt())
        namespace, layout = saving._session.bound_model.namespace(), saving._session.bound_model.layout()
    teacher = CostMemory(None)
    loads = [Span("load-0", index, index * 1e-6, (index + 1) * 1e-6, "loaded") for index in range(8)]
    for _ in range(2):  # what is measured first is cold
        teacher.learn(saw(*((index, 9000.0) for index in range(8))), loads, layout.nbytes)
    recall_costs(store, namespace, "cpu")._learner = teacher._learner
    with CakeCache(model, store, chunk_size=CHUNK) as warm:
        outcome = run(model, prompt(), warm)
        assert (warm.report.chunks_loaded, warm.report.chunks_computed) == (CHUNKS, 0)
        assert [span.outcome for span in warm.report.timeline if span.actor == "compute"] == ["computed"]  # the tail
    assert difference(outcome, oracle(model, prompt())) == ""


def test_learners_go_with_their_store() -> None:
    store = MemoryStore()
    learner = weakref.ref(recall_costs(store, "ns", "cpu"))
    gc.collect()
    assert learner() is recall_costs(store, "ns", "cpu")
    del store
    gc.collect()
    assert learner() is None


def test_after_one_full_hit_no_forward_is_begun_that_the_loads_overtake() -> None:
    """Where all is always loaded no chunk is ever computed; the last piece tells what one would cost."""
    model = shared_model("llama")
    fast = filled_store(model)  # a store object of its own, of which nothing is known yet
    with CakeCache(model, fast, chunk_size=CHUNK, save=False, strategy="load") as first:
        run(model, prompt(), first)
        memory = first._session.cost_memory(first._session.bound_model.namespace())
    assert memory.costs(1000).compute is not None
    assert memory.costs(1000).load is not None
