"""With exact=False a store knows what the model computed whose KV it holds: also in other processes and on other machines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, Limits, MemoryStore, Report, StoreError
from cake_hf.cli.inspect_store import take_inventory
from cake_hf.keys import behaviour_key
from cake_hf.model import reference
from cake_hf.stores import Store
from cake_hf.testing import WrapperStore
from models import CHUNK, CHUNKS, Outcome, build, difference, oracle, prompt, run
from test_changed_models import edited_buffer, plain_attribute, replaced

Change = Callable[[Any], AbstractContextManager[None]]
IDS = prompt()
NOTHING = "this model computes something else than the one whose KV the store holds"


def another_function_of_torch(model: Any) -> AbstractContextManager[None]:
    """Nothing of it is the user's code."""
    return replaced(torch.nn.functional, "silu", torch.nn.functional.gelu)


def another_module_of_torch(model: Any) -> AbstractContextManager[None]:
    return replaced(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU())


@contextmanager
def epsilon(model: Any) -> Iterator[None]:
    norm = model.model.layers[1].input_layernorm
    before, norm.variance_epsilon = norm.variance_epsilon, 10.0
    yield
    norm.variance_epsilon = before


CHANGES: list[Change] = [edited_buffer, plain_attribute, another_function_of_torch, another_module_of_torch, epsilon]


def answer(store: Any, change: Change | None = None, **options: Any) -> tuple[Outcome, Report]:
    """By a model that this process has not seen before."""
    model = build("llama")
    with nullcontext() if change is None else change(model):
        settings = {"chunk_size": CHUNK, "exact": False, "strategy": "load", **options}
        with CakeCache(model, store, **settings) as cache:
            outcome = run(model, IDS, cache)
            assert cache.flush(60)
            return outcome, cache.report


def expected(change: Change | None = None) -> Outcome:
    model = build("llama")
    with nullcontext() if change is None else change(model):
        return oracle(model, IDS)


def kinds(folder: Path) -> dict[str, Any]:
    return {"memory": MemoryStore(), "directory": folder / "kv", "tiers": ["memory:1GB", folder / "below"]}


@pytest.mark.fault(
    "Model",
    "With `exact=False`, a model is edited (buffers, attributes, modules, functions) before the process's first prompt.",
    "What it computes is compared with what the model of the stored KV computed; where it differs it has keys of its own.",
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["memory", "directory", "tiers"])
def test_a_model_that_was_changed_before_it_was_first_seen(change: Change, kind: str, tmp_path: Path) -> None:
    store = kinds(tmp_path)[kind]
    answer(store)
    plain, changed = expected(), expected(change)
    assert difference(plain, changed), "the change changes nothing: no test of anything"
    outcome, report = answer(store, change)
    assert (report.chunks_loaded, report.reason.startswith(NOTHING)) == (0, True)
    assert difference(outcome, changed) == ""
    outcome, report = answer(store)
    assert (report.chunks_loaded, report.reason) == (CHUNKS, "")
    assert difference(outcome, plain) == ""
    assert answer(store, change)[1].chunks_loaded == CHUNKS  # its own


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_stored_one_counts_whichever_is_right(change: Change) -> None:
    store = MemoryStore()
    answer(store, change)
    outcome, report = answer(store)
    assert (report.chunks_loaded, report.reason.startswith(NOTHING)) == (0, True)
    assert difference(outcome, expected()) == ""
    assert answer(store, change)[1].chunks_loaded == CHUNKS


@contextmanager
def two_threads(model: Any) -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@contextmanager
def other_attention(model: Any) -> Iterator[None]:
    model.set_attn_implementation("eager")
    yield


@contextmanager
def other_kernels(model: Any) -> Iterator[None]:
    torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(True)


@pytest.mark.parametrize("change", [two_threads, other_attention, other_kernels], ids=lambda change: change.__name__)
def test_a_model_that_differs_by_rounding_alone_hits(change: Change) -> None:
    """The negative control."""
    store = MemoryStore()
    answer(store)
    assert answer(store, change)[1].chunks_loaded == CHUNKS


def test_an_edited_model_in_another_process_finds_nothing(tmp_path: Path) -> None:
    answer(tmp_path, edited_buffer)
    child = "import sys, test_reference as t; r = t.answer(sys.argv[1])[1]; print(r.chunks_loaded, r.reason)"
    command = [sys.executable, "-c", child, str(tmp_path)]
    told = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    assert told.stdout.startswith(f"0 {NOTHING}")


def values(store: Store) -> dict[str, Any]:
    return {key: store.read(key) for key in store.keys()}  # noqa: SIM118  # a store is no mapping


def beside(store: Store) -> str:
    """The key of the one reference."""
    (key,) = take_inventory(store, lambda done, total: None).behaviours
    return key


def test_there_is_one_small_value_for_a_namespace() -> None:
    store = MemoryStore()
    answer(store)
    answer(store)
    inventory = take_inventory(store, lambda done, total: None)
    (entry,) = inventory.behaviours.values()
    assert len(inventory.chunks) == CHUNKS
    assert entry.metadata.namespace == next(iter(inventory.chunks.values())).metadata.namespace
    assert entry.metadata.key == behaviour_key(entry.metadata.namespace)
    assert entry.file_bytes < 2**14


@pytest.mark.parametrize("options", [{"save": False}, {"exact": True}])
def test_nothing_is_written_where_nothing_is_saved_and_none_with_exact(options: dict[str, Any]) -> None:
    store = MemoryStore()
    answer(store, **options)
    assert not take_inventory(store, lambda done, total: None).behaviours


def test_a_store_that_is_only_read_is_left_as_it_is_and_believed(tmp_path: Path) -> None:
    answer(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    _, report = answer(tmp_path, plain_attribute, save=False)
    assert report.reason.startswith(NOTHING)
    assert answer(tmp_path, save=False)[1].chunks_loaded == CHUNKS
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def broken(raw: bytearray, how: str) -> bytes:
    flipped = bytearray(raw)
    flipped[-1] ^= 1
    return {"empty": b"", "short": bytes(raw[:-4]), "long": bytes(raw) + b"\0" * 4096, "flipped": bytes(flipped),
            "noise": b"\xff" * len(raw)}[how]  # fmt: skip


@pytest.mark.fault(
    "Files",
    "The numbers that a store keeps of what a model computes are damaged, absurd, or gone.",
    "They are ignored; who saves there writes them anew.",
)
@pytest.mark.parametrize("how", ["empty", "short", "long", "flipped", "noise", "gone"])
def test_a_reference_that_makes_no_sense_is_none(how: str) -> None:
    store = MemoryStore()
    answer(store)
    key = beside(store)
    good = store.read(key)
    assert good is not None
    if how == "gone":
        store.delete(key)
    else:
        store.write(key, [broken(good, how)], replace=True)
    copy = MemoryStore()  # which this process has not asked yet
    for name, value in values(store).items():
        copy.write(name, [value])
    assert answer(copy, save=False)[1].chunks_loaded == CHUNKS
    assert copy.read(key) != good
    again = MemoryStore()
    for name, value in values(copy).items():
        again.write(name, [value])
    assert answer(again)[1].chunks_loaded == CHUNKS
    assert again.read(key) == good
    assert answer(again, plain_attribute)[1].chunks_loaded == 0


def test_numbers_that_are_none_are_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Well-formed as a file."""
    store = MemoryStore()
    real = reference._some_numbers
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_some_numbers", lambda seen: {n: t * float("nan") for n, t in real(seen).items()})
        patch.setattr(reference, "_is_sound", lambda numbers: True)
        patch.setattr(reference, "differ", lambda *_: False)
        answer(store)
    copy = MemoryStore()
    for name, value in values(store).items():
        copy.write(name, [value])
    assert answer(copy)[1].chunks_loaded == CHUNKS
    assert answer(copy, plain_attribute)[1].chunks_loaded == 0


class Failing(WrapperStore):
    """Fails at one method, for one value alone."""

    def __init__(self, inner: Store, method: str, key: str) -> None:
        super().__init__(inner)
        self.method, self.key = method, key

    def read_into(self, key: str, parts: Any) -> int | None:
        self._check("read_into", key)
        return self.inner.read_into(key, parts)

    def write(self, key: str, parts: Any, *, replace: bool = False) -> bool:
        self._check("write", key)
        return self.inner.write(key, parts, replace=replace)

    def _check(self, method: str, key: str) -> None:
        if (method, key) == (self.method, self.key):
            raise StoreError("it does not answer")


def test_where_the_store_does_not_say_which_model_its_kv_is_of_nothing_is_used() -> None:
    inner = MemoryStore()
    answer(inner)
    store, before = Failing(inner, "read_into", beside(inner)), values(inner)
    outcome, report = answer(store)
    assert report.reason == "the store could not be asked: it does not answer"
    assert report.chunks_loaded == report.chunks_saved == 0
    assert torch.equal(outcome.tokens, expected().tokens)
    assert values(inner) == before
    store.method = ""
    assert answer(store)[1].chunks_loaded == CHUNKS


def test_a_reference_that_cannot_be_written_is_kept_in_the_process() -> None:
    """As with stores that are read-only, such as packs."""
    inner = MemoryStore()
    answer(inner)
    key = beside(inner)
    inner.delete(key)
    store, model = Failing(inner, "write", key), build("llama")

    def loaded() -> int:
        with CakeCache(model, store, chunk_size=CHUNK, exact=False, strategy="load") as cache:
            run(model, IDS, cache)
            return cache.report.chunks_loaded

    assert loaded() == CHUNKS
    with plain_attribute(model):
        assert loaded() == 0
    assert loaded() == CHUNKS


class Racing(WrapperStore):
    """Another process writes its numbers between this one's question and its own writing."""

    def __init__(self, inner: Store, theirs: dict[str, Any]) -> None:
        super().__init__(inner)
        self.theirs = theirs

    def write(self, key: str, parts: Any, *, replace: bool = False) -> bool:
        if key in self.theirs:
            self.inner.write(key, [self.theirs[key]])
        return self.inner.write(key, parts, replace=replace)


def test_a_second_model_is_compared_with_the_first_one() -> None:
    first = MemoryStore()
    answer(first)
    key = beside(first)
    theirs = {key: first.read(key)}
    inner = MemoryStore()
    _, report = answer(Racing(inner, theirs), edited_buffer)
    assert report.reason.startswith(NOTHING)
    assert inner.read(key) == theirs[key]


def test_the_store_is_asked_again_after_a_while_so_that_eviction_does_not_take_it_first() -> None:
    now = [0.0]
    store, asked = MemoryStore(), []
    model, mine = build("llama"), {"0.keys": torch.ones(8)}

    class Counting(WrapperStore):
        def read_into(self, key: str, parts: Any) -> int | None:
            asked.append(key)
            return self.inner.read_into(key, parts)

    def differs() -> bool:
        late = reference.Late()
        reference_place = reference.ReferencePlace(counting, "ab" * 20, "", True, 60.0, late, late, lambda: now[0])
        return reference.computes_otherwise(model, "content", mine, reference_place)

    counting = Counting(store)
    for seconds, times in ((0.0, 0), (1.0, 0), (reference.AGREED_SECONDS, 1)):
        now[0] = seconds
        assert not differs()
        assert len(asked) == times
    store.delete(behaviour_key("ab" * 20))
    now[0] += reference.AGREED_SECONDS
    assert not differs()
    assert list(store.keys()) == [behaviour_key("ab" * 20)]


def test_large_states_are_kept_in_part() -> None:
    some = reference._some_numbers({"0.recurrent": torch.randn(1, 32, 128, 128), "0.keys": torch.randn(1, 2, 2, 8)})
    assert {name: len(numbers) for name, numbers in some.items()} == {"0.recurrent": 4096, "0.keys": 32}


def test_other_chunk_sizes_and_salts_have_their_own() -> None:
    store = MemoryStore()
    for options in ({}, {"salt": "s"}, {"chunk_size": 2 * CHUNK}):
        answer(store, **options)  # type: ignore[arg-type]
    assert len(take_inventory(store, lambda done, total: None).behaviours) == 3
    assert answer(store, salt="s", limits=Limits(lookup_timeout=60.0))[1].chunks_loaded == CHUNKS
