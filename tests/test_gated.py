"""What comes after the last loads waits in each layer for that layer of them only, and no bit changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from cake_hf import CakeCache, Limits, MemoryStore
from cake_hf.arithmetic.errors import StoreError
from cake_hf.arithmetic.keys import chunk_keys
from cake_hf.arithmetic.planner import Rule
from cake_hf.cache import pace, restore
from cake_hf.cache.probe import kv_like
from cake_hf.stores.base import Store
from cake_hf.stores.wrappers import GateStore, WrapperStore
from models import CHUNK, CHUNKS, Outcome, difference, oracle, prompt, run, shared_model

VARIANTS = [("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "float32"), ("gpt_neox", "bfloat16")]
LAYERS = 3
WHOLE = CHUNKS - 1
"""Chunks that one loader reads whole before the last one, which it reads in ranges."""


@pytest.fixture(autouse=True)
def ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """One range per layer, whatever was learnt."""
    monkeypatch.setattr(pace, "ranges_of", lambda *_: LAYERS)


@pytest.fixture(params=["load", "both"])
def strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Load-only puts chunks into place at once; both has them aside, and here never finds one worth computing."""
    monkeypatch.setattr(Rule, "worth", lambda *_: False)
    return str(request.param)


def filled_store(model: torch.nn.Module, chunks: int = CHUNKS) -> MemoryStore:
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as saving:
        saving.prefill(prompt()[:, : chunks * CHUNK], whole=True)
    return store


@cache
def expected(family: str, dtype: str) -> Outcome:
    return oracle(shared_model(family, dtype), prompt())


def cache_of(model: torch.nn.Module, store: Store, strategy: str, **limits: float) -> CakeCache:
    kv_like(model)  # runs the model once, which must not count
    found = Limits(**{"loader_threads": 1, **limits})  # type: ignore[arg-type]
    return CakeCache(model, store, chunk_size=CHUNK, save=False, strategy=strategy, limits=found)


@contextmanager
def before_layers(model: torch.nn.Module, action: Callable[[int, int], None]) -> Iterator[None]:
    """Call `action(layer, forward)` before each layer's attention; forwards are counted from 1."""
    attentions = [module for name, module in model.named_modules() if name.endswith(("self_attn", ".attention"))]
    assert len(attentions) == LAYERS
    counts = [0] * LAYERS

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[layer] += 1
            action(layer, counts[layer])

        return hook

    handles = [module.register_forward_pre_hook(hook_of(layer)) for layer, module in enumerate(attentions)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def join_loaders() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("cake-load"):
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_the_last_piece_runs_while_upper_layers_still_arrive(family: str, dtype: str, strategy: str) -> None:
    """A layer's range is let through only when the last piece has come to it: who waited for all would wait for ever."""
    model = shared_model(family, dtype)
    gate = GateStore(filled_store(model), ranges=True)
    gate.open(WHOLE)
    with (
        cache_of(model, gate, strategy) as warm,
        before_layers(model, lambda layer, forward: gate.open(WHOLE + layer + 1) if forward == 1 else None),
    ):
        outcome = run(model, prompt(), warm)
        report = warm.report
    assert difference(outcome, expected(family, dtype)) == ""
    assert (report.chunks_loaded, report.chunks_computed, report.chunks_failed) == (CHUNKS, 0, 0)
    assert [span.outcome for span in report.timeline if span.chunk < 0] == ["gated"]


@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_new_chunks_after_the_prefix_do_not_wait_either(family: str, dtype: str, strategy: str) -> None:
    model = shared_model(family, dtype)
    stored = 5
    gate = GateStore(filled_store(model, stored), ranges=True)
    gate.open(stored - 1)
    with (
        cache_of(model, gate, strategy) as warm,
        before_layers(model, lambda layer, forward: gate.open(stored + layer) if forward == 1 else None),
    ):
        outcome = run(model, prompt(), warm)
        report = warm.report
    assert difference(outcome, expected(family, dtype)) == ""
    assert (report.chunks_loaded, report.chunks_computed, report.chunks_failed) == (stored, CHUNKS - stored, 0)
    spans = {span.chunk: span.outcome for span in report.timeline if span.actor == "compute"}
    assert spans == {5: "gated", 6: "computed", 7: "computed", -1: "computed"}


class BadRange(WrapperStore):
    """The n-th range that is read (from 0) goes wrong."""

    def __init__(self, inner: Store, number: int, fault: str) -> None:
        super().__init__(inner)
        self.number = number
        self.fault = fault
        self.count = 0
        self.released = threading.Event()

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        number, self.count = self.count, self.count + 1
        found = super().read_range(key, parts, offset)
        if number != self.number:
            return found
        if self.fault == "error":
            raise StoreError("an injected fault")
        if self.fault == "flip":
            parts[-1][5] ^= 1
        if self.fault == "stall":
            self.released.wait(60)
            for part in parts:
                part[:] = b"\xa5" * part.nbytes
        return found and self.fault != "drop"


@pytest.mark.parametrize("fault", ["error", "flip", "drop", "stall"])
@pytest.mark.parametrize("number", range(LAYERS))
@pytest.mark.parametrize(("family", "dtype"), VARIANTS[:3])
def test_a_load_that_fails_within_the_last_piece_is_made_up_for(
    family: str, dtype: str, number: int, fault: str, strategy: str
) -> None:
    """The chunk is computed in the middle of the last piece's forward, which then goes on as if nothing had been."""
    model = shared_model(family, dtype)
    store = BadRange(filled_store(model), number, fault)
    with cache_of(model, store, strategy, read_timeout=0.2 if fault == "stall" else 60) as warm:
        outcome = run(model, prompt(), warm)
        store.released.set()
        join_loaders()
        report = warm.report
        assert difference(outcome, expected(family, dtype)) == ""
        for layer, keys in zip(warm.layers, outcome.keys, strict=True):
            assert torch.equal(layer.keys, keys)  # what came late went elsewhere
    assert (report.chunks_loaded, report.chunks_computed) == (CHUNKS - 1, 1)
    assert report.chunks_failed + report.chunks_missed == 1


def test_a_late_load_is_overtaken_within_the_last_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aside, so that no deadline is needed: computing it is found worth it after all."""
    model = shared_model("llama", "float32")
    gate = GateStore(filled_store(model), ranges=True)
    gate.open(WHOLE + 1)
    late = threading.Event()
    monkeypatch.setattr(Rule, "worth", lambda *_: late.is_set())
    with (
        cache_of(model, gate, "both", read_timeout=60) as warm,
        before_layers(model, lambda layer, forward: late.set() if (layer, forward) == (1, 1) else None),
    ):
        outcome = run(model, prompt(), warm)
        gate.open()
        join_loaders()
        report = warm.report
    assert difference(outcome, expected("llama", "float32")) == ""
    assert (report.chunks_loaded, report.chunks_computed, report.chunks_failed) == (CHUNKS - 1, 1, 0)


def test_a_second_turn_is_gated_too(strategy: str) -> None:
    model = shared_model("llama", "float32")
    store = filled_store(model)
    first, whole = prompt()[:, : 3 * CHUNK], prompt()
    gate = GateStore(store, ranges=True)
    gate.open(2 + LAYERS)  # the first turn: two chunks before its last piece, which is a whole one
    with cache_of(model, gate, strategy) as warm:
        model.generate(first, past_key_values=warm, max_new_tokens=1, do_sample=False)
        gate.open()
        outcome = run(model, whole, warm)
        assert warm.report.chunks_loaded == CHUNKS - 3
    assert torch.equal(outcome.tokens, oracle(model, whole).tokens)
    assert torch.equal(outcome.logits, oracle(model, whole).logits)


def test_a_last_piece_that_fails_leaves_the_cache_as_it_was(strategy: str) -> None:
    model = shared_model("llama", "float32")
    gate = GateStore(filled_store(model), ranges=True)
    gate.open(WHOLE + 1)

    def fail(layer: int, forward: int) -> None:
        if (layer, forward) == (1, 1):
            raise MemoryError("no room for the attention")

    with cache_of(model, gate, strategy) as warm:
        with before_layers(model, fail), pytest.raises(MemoryError, match="no room"):
            run(model, prompt(), warm)
        assert warm.get_seq_length() == 0
        gate.open()
        join_loaders()
        assert difference(run(model, prompt(), warm), expected("llama", "float32")) == ""
        assert warm.report.chunks_loaded == CHUNKS


def test_prefill_comes_back_when_all_is_there(strategy: str) -> None:
    model = shared_model("llama", "float32")
    with cache_of(model, filled_store(model), strategy) as warm:
        assert warm.prefill(prompt()).chunks_loaded == CHUNKS
        assert warm.get_seq_length() == CHUNKS * CHUNK
        assert difference(run(model, prompt(), warm), expected("llama", "float32")) == ""


def test_a_wrong_layer_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a last piece that does not wait for its layers gives other logits."""
    model = shared_model("llama", "float32")
    gate = GateStore(filled_store(model), ranges=True)
    gate.open(WHOLE)
    monkeypatch.setattr(restore.Restore, "await_layer", lambda *_: None)
    with cache_of(model, gate, "load") as warm:
        ids = prompt()
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=warm, logits_to_keep=1).logits
            gate.open()
    assert not torch.equal(logits[:, -1], oracle(model, ids).logits[0])


class Torn(WrapperStore):
    """The first chunk's read fills its buffers with garbage and hangs until it is released."""

    def __init__(self, inner: Store, key: str) -> None:
        super().__init__(inner)
        self.reads_ranges = True
        self.key = key
        self.begun = threading.Event()
        self.released = threading.Event()

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        if key == self.key:
            self._tear(parts)
        return super().read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        if key == self.key:
            self._tear(parts)
        return super().read_range(key, parts, offset)

    def _tear(self, parts: Sequence[memoryview]) -> None:
        for part in parts:
            part[:] = b"\xa5" * part.nbytes
        self.begun.set()
        self.released.wait(60)


@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_an_overtaken_load_under_way_is_nobodys(family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk 0 is computed while its load, aside, has brought garbage so far; then the last piece goes beyond the others."""
    model = shared_model(family, dtype)
    store = filled_store(model)
    with CakeCache(model, store, chunk_size=CHUNK) as naming:
        keys = chunk_keys(naming._session.namespace(), prompt()[0].tolist(), CHUNK)
    torn = Torn(store, keys[0])
    monkeypatch.setattr(Rule, "worth", lambda _, chunk, *__: chunk == 0 and torn.begun.is_set())
    with cache_of(model, torn, "both", loader_threads=2, read_timeout=60) as warm:
        outcome = run(model, prompt(), warm)
        torn.released.set()
        join_loaders()
        assert warm.report.chunks_computed == 1
    assert difference(outcome, expected(family, dtype)) == ""
