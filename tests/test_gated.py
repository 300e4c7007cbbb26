"""What comes after the last loads waits in each layer for that layer of them only, and no bit changes."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, Limits, Store, StoreError
from cake_hf.model.kv_layout import kv_template
from cake_hf.restore import restore
from cake_hf.scheduling.frontier import Frontier
from cake_hf.testing import GateStore, WrapperStore
from forwards import attentions, before_forward
from hanging import no_waiting_when
from models import CHUNK, CHUNKS, difference, expected, oracle, prompt, run, shared_model
from naming import given
from paces import Answer, in_ranges, no, told
from stored import filled_store, keys_in_order
from waiting import PATIENCE, join_loaders

VARIANTS = [("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "float32"), ("gpt_neox", "bfloat16")]
LAYERS = 3
WHOLE = CHUNKS - 1
"""Chunks that one loader reads whole before the last one, which it reads in ranges."""


@pytest.fixture(params=["load", "both"])
def strategy(request: pytest.FixtureRequest) -> str:
    """Load-only has all chunks in place; both stages some, and here never finds one worth computing."""
    return str(request.param)


def cache_of(model: torch.nn.Module, store: Store, strategy: str, *, worth: Answer = no, **limits: float) -> CakeCache:
    """A cache whose last loads are read in one range per layer, whatever was learnt."""
    kv_template(model)  # runs the model once, which must not count
    found = Limits.from_environment(**{"loader_threads": 1, **limits})
    rules = told(worth, ranges=in_ranges(LAYERS))
    return CakeCache(model, store, chunk_size=CHUNK, save=False, strategy=strategy, limits=found, rules=rules)


@contextmanager
def before_layers(model: torch.nn.Module, action: Callable[[int, int], None]) -> Iterator[None]:
    """Call `action(layer, forward)` before each layer's attention; forwards are counted from 1."""
    modules = attentions(model)
    assert len(modules) == LAYERS
    with ExitStack() as stack:
        for layer, module in enumerate(modules):
            stack.enter_context(before_forward(module, partial(action, layer)))
        yield


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
    gate = GateStore(filled_store(model, prompt()[:, : stored * CHUNK]), ranges=True)
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
        self.stalled = threading.Event()
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
            self.stalled.set()
            self.released.wait(PATIENCE)
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
    with no_waiting_when(store.stalled.is_set), cache_of(model, store, strategy, read_timeout=PATIENCE) as warm:
        outcome = run(model, prompt(), warm)
        store.released.set()
        join_loaders()
        report = warm.report
        assert difference(outcome, expected(family, dtype)) == ""
        for layer, keys in zip(warm.layers, outcome.keys, strict=True):
            assert torch.equal(layer.keys, keys)  # what came late went elsewhere
    assert (report.chunks_loaded, report.chunks_computed) == (CHUNKS - 1, 1)
    assert report.chunks_failed + report.chunks_missed == 1


def test_a_late_load_is_superseded_within_the_last_piece() -> None:
    """It is staged, so no deadline is needed: its chunk is computed in the middle of the forward."""
    model = shared_model("llama", "float32")
    gate = GateStore(filled_store(model), ranges=True)
    gate.open(WHOLE + 1)
    late = threading.Event()
    with (
        cache_of(model, gate, "both", worth=lambda _: late.is_set(), read_timeout=60) as warm,
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
        model.generate(first, **given(warm), max_new_tokens=1, do_sample=False)
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


def test_a_suffix_that_does_not_wait_gives_other_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a last piece that does not wait for its layers gives other logits."""
    model = shared_model("llama", "float32")
    gate = GateStore(filled_store(model), ranges=True)
    gate.open(WHOLE)
    monkeypatch.setattr(restore.Restore, "await_layer", lambda *_: None)
    with cache_of(model, gate, "load") as warm:

        def spoil(layer: int, forward: int) -> None:
            """New memory may by chance hold what belongs there, from a test before this one."""
            for buffer in warm.layers[layer].buffers:
                buffer[:, :CHUNK] = 1

        head = model.get_output_embeddings()  # it comes when all layers are through
        with torch.no_grad(), before_layers(model, spoil), before_forward(head, lambda _: gate.open()):
            logits = model(input_ids=prompt(), **given(warm), logits_to_keep=1).logits
    assert not torch.equal(logits[:, -1], expected("llama", "float32").logits[0])


class Torn(WrapperStore):
    """One value's read fills its buffers with garbage and hangs until `released`; that of another one waits for `go_on`."""

    def __init__(self, inner: Store, torn: str, held: str) -> None:
        super().__init__(inner)
        self._waits = {torn: self._tear, held: self._hold}
        self.held = threading.Event()
        self.torn = threading.Event()
        self.go_on = threading.Event()
        self.released = threading.Event()

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        self._waits.get(key, pass_by)(parts)
        return super().read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        self._waits.get(key, pass_by)(parts)
        return super().read_range(key, parts, offset)

    def _hold(self, parts: Sequence[memoryview]) -> None:
        self.held.set()
        self.go_on.wait(PATIENCE)

    def _tear(self, parts: Sequence[memoryview]) -> None:
        self.held.wait(PATIENCE)
        for part in parts:
            part[:] = b"\xa5" * part.nbytes
        self.torn.set()
        self.released.wait(PATIENCE)


def pass_by(parts: Sequence[memoryview]) -> None:
    """Of a read that nothing is done to."""


@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_an_overtaken_load_under_way_is_dropped(family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk 0 is computed while its load, aside, has brought garbage so far; then the last piece goes beyond chunk 1.

    By then all later chunks are loaded: two loaders claim from the back, and each of them is stuck at one of these two.
    """
    model = shared_model(family, dtype)
    store = filled_store(model)
    torn = Torn(store, *keys_in_order(store)[:2])
    advance = Frontier.advance

    def advance_when_torn(frontier: Frontier, **options: Any) -> int | None:
        assert torn.torn.wait(PATIENCE)
        return advance(frontier, **options)

    monkeypatch.setattr(Frontier, "advance", advance_when_torn)
    first_alone = partial(operator.eq, 0)
    with (
        cache_of(model, torn, "both", worth=first_alone, loader_threads=2, read_timeout=PATIENCE) as warm,
        before_layers(model, lambda layer, forward: torn.go_on.set() if (layer, forward) == (0, 2) else None),
    ):
        outcome = run(model, prompt(), warm)
        torn.released.set()
        join_loaders()
        report = warm.report
    assert (report.chunks_computed, report.chunks_loaded) == (1, CHUNKS - 1)
    assert [span.outcome for span in report.timeline if span.chunk < 0] == ["gated"]
    assert difference(outcome, expected(family, dtype)) == ""
