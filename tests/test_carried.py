"""Windows and recurrent states go on from the right place whatever fails, is missing, or comes when; no bit changes."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeCache, Limits, MemoryStore, Store, reads_only
from cake_hf.chunks.codec import header_size, parse_header
from cake_hf.keys import state_key
from cake_hf.layers import IndexedLayer
from cake_hf.model.kv_layout import kv_template
from cake_hf.model.trials import forgets
from cake_hf.scheduling.frontier import Frontier
from cake_hf.testing import FaultStore, GateStore, WrapperStore
from cake_hf.testing.forgery import forge
from cake_hf.transfer.landing import DevicePlace
from cake_hf.transfer.single_flight import LEFT_PER_READ
from cake_hf.transfer.single_reads import ReadBeside
from families import FAMILIES as BUILDERS
from families import WINDOW, family_model, here
from family_runs import (
    CHUNKS,
    IDS,
    check,
    content,
    difference,
    expected,
    generate,
)
from forwards import meeting_at
from hanging import no_waiting_for
from models import CHUNK, prompt, run_ahead
from naming import given
from paces import in_ranges, no, told
from stored import filled_store, without
from test_gated import BadRange
from waiting import PATIENCE, join_loaders, loaders

FAMILIES = here("gemma3", "mistral", "qwen3_next", "falcon_h1", "lfm2")
RECURRENT = here("qwen3_next", "falcon_h1", "lfm2")

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these


def keys_by_index(store: Store, *, states: bool = False) -> dict[int, str]:
    """The keys of a store's chunks, or of its states, by their place in the prompt."""
    facts = [parse_header(store.read(key) or b"")[0] for key in store.keys()]  # noqa: SIM118  # a store is no mapping
    return {fact.index: fact.key for fact in facts if (state_key(fact.parent) == fact.key) == states}


def run_chunks(cache: CakeCache) -> list[int]:
    """The chunks that the model was run on, in order."""
    return [span.chunk for span in cache.report.timeline if span.actor == "compute" and span.chunk >= 0]


def oracle(family: str, ids: torch.Tensor) -> Any:
    model: Any = family_model(family)
    return generate(model, DynamicCache(config=model.config), ids, prefill_chunk_size=CHUNK)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("meeting", range(1, CHUNKS))
def test_every_meeting_point(family: str, meeting: int) -> None:
    model, store = family_model(family), filled_store(family_model(family), IDS)
    gate = GateStore(store)
    with CakeCache(
        model, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
    ) as cache:
        kv_template(model)  # runs the model once, which must not count
        states = len(keys_by_index(store, states=True))
        assert states == (family in RECURRENT)
        with meeting_at(model, gate, meeting, CHUNKS - meeting, states):
            check(family, generate(model, cache), f"met at {meeting}")
        assert (cache.report.chunks_computed, cache.report.chunks_loaded) == (meeting, CHUNKS - meeting)
        assert cache.report.states_loaded == states
        assert run_chunks(cache) == list(range(meeting))  # none of them twice


@contextmanager
def arriving(
    model: torch.nn.Module, gate: GateStore, begun: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Open the gate while that chunk is being computed, and hold the forward until the chunk has come from the store.

    It is held before the model's last layer: what the layers before it carry has moved on, what this one carries has not. So
    many reads have to have come to the gate before the first forward: a load that began later might not let others contest.
    """
    arrived, settle, forwards = threading.Event(), Frontier.settle, 0

    def settled(frontier: Frontier, index: int, *how: Any) -> bool:
        counts = settle(frontier, index, *how)
        if index == chunk:
            arrived.set()
        return counts

    def before(module: object, args: object, kwargs: object) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 1:
            gate.await_begun(begun)
        if forwards == chunk + 1:
            gate.open()
            assert arrived.wait(60)

    monkeypatch.setattr(Frontier, "settle", settled)
    last = model.model.layers[-1]  # type: ignore[union-attr, index]
    handle = last.register_forward_pre_hook(reads_only(before), with_kwargs=True)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()
        gate.open()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [0, 3, CHUNKS - 1])
def test_a_forward_whose_chunk_arrives_is_left(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gate = family_model(family), GateStore(filled_store(family_model(family), IDS))
    with CakeCache(
        model, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
    ) as cache:
        with arriving(model, gate, 1 + (family in RECURRENT), chunk, monkeypatch):
            check(family, generate(model, cache), f"left at {chunk}")
        report = cache.report
    assert [span.outcome for span in report.timeline if span.chunk == chunk and span.actor == "compute"] == [
        "preempted"
    ]
    assert (report.chunks_computed, report.chunks_loaded) == (chunk, CHUNKS - chunk)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_load_fails_behind_a_forward_that_was_left(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and states are then neither those before the chunk that was left nor those behind it."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    stalled = FaultStore(store, {keys_by_index(store)[4]: "stall"})
    gate = GateStore(stalled)
    limits = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)
    with CakeCache(model, gate, chunk_size=CHUNK, save=False, limits=limits) as cache:
        with no_waiting_for(stalled), arriving(model, gate, 2 + (family in RECURRENT), 3, monkeypatch):
            check(family, generate(model, cache), "left, and the next one late")
        report = cache.report
        stalled.release()
        join_loaders()
    assert next(span.outcome for span in report.timeline if span.chunk == 3 and span.actor == "compute") == "preempted"
    assert report.chunks_failed == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["drop", "flip", "error"])
def test_chunks_that_fail_are_made_up_for(family: str, fault: str) -> None:
    model, store = family_model(family), filled_store(family_model(family), IDS)
    keys = keys_by_index(store)
    for bad, strategy in itertools.product([(0,), (5,), (1, 4)], ["load", "both"]):
        faulty = FaultStore(store, {keys[index]: fault for index in bad})
        with CakeCache(model, faulty, chunk_size=CHUNK, strategy=strategy, save=False) as cache:
            check(family, generate(model, cache), f"{bad} {strategy}")
            report = cache.report
        assert report.chunks_loaded + report.chunks_computed == CHUNKS
        if strategy == "load":
            assert report.chunks_missed + report.chunks_failed == len(bad)


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("fault", ["drop", "flip", "error", "truncate", "stall"])
def test_a_state_that_fails_is_computed(family: str, fault: str) -> None:
    """Where a state is of no use, all is computed; and where it was stored, and is unusable, it is made anew."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    (key,) = keys_by_index(store, states=True).values()
    faulty = FaultStore(store, {key: fault})
    limits = Limits(read_timeout=0.05 if fault == "stall" else PATIENCE)  # chunks that are late then are computed
    with CakeCache(model, faulty, chunk_size=CHUNK, strategy="load", limits=limits) as cache:
        check(family, generate(model, cache), fault)
        faulty.release()
        join_loaders()
        assert cache.flush(60)
        assert cache.report.states_loaded == 0
        assert cache.report.states_saved == 1


@pytest.mark.parametrize("family", RECURRENT[:1])
def test_states_that_hang_cost_no_more_threads_with_each_prompt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where prompts follow each other long before these are known to hang: nothing waits for them here."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    (key,) = keys_by_index(store, states=True).values()
    faulty = FaultStore(store, {key: "stall"})
    wait = ReadBeside.wait
    monkeypatch.setattr(ReadBeside, "wait", lambda read, seconds: wait(read, 0.01))
    limits = Limits(loader_threads=1, read_timeout=PATIENCE, lookup_timeout=PATIENCE)
    for _ in range(LEFT_PER_READ + 3):
        with CakeCache(model, faulty, chunk_size=CHUNK, save=False, limits=limits) as cache:
            check(family, generate(model, cache), "hung")
    states = [thread for thread in loaders() if thread.name == "cake-load-state"]
    assert len(states) == len(faulty.injected) == LEFT_PER_READ
    faulty.release()
    join_loaders()
    faulty.faults.clear()
    with CakeCache(model, faulty, chunk_size=CHUNK, strategy="load", save=False, limits=limits) as cache:
        check(family, generate(model, cache), "again")
        assert cache.report.states_loaded == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_holes_anywhere(family: str) -> None:
    model, store = family_model(family), filled_store(family_model(family), IDS)
    for pattern in (0b000001, 0b100000, 0b010100, 0b111000, 0b000111, 0b101010, 0b011110):
        holes = [index for index in range(CHUNKS) if pattern >> index & 1]
        for strategy in ("load", "both"):
            with CakeCache(model, without(store, *holes), chunk_size=CHUNK, strategy=strategy) as cache:
                check(family, generate(model, cache), f"holes at {holes}, {strategy}")
                assert cache.report.chunks_missed == len(holes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [CHUNK, CHUNK + 1, 2 * CHUNK, 4 * CHUNK, 4 * CHUNK + 1])
def test_prompt_lengths_at_the_edges(family: str, tokens: int) -> None:
    model, store, ids = family_model(family), MemoryStore(), IDS[:, :tokens]
    whole = (tokens - 1) // CHUNK
    for turn in range(3):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            run = generate(model, cache, ids)
            assert cache.flush(60)
            assert cache.report.chunks_saved == (0 if turn else tokens // CHUNK)
            assert cache.report.chunks_loaded == (whole if turn else 0)
        assert difference(run, oracle(family, ids)) == "", f"turn {turn}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_prompt_goes_on_in_the_same_cache(family: str) -> None:
    """Its windows reach back to what is in the cache, which no load brings."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    for first, strategy in itertools.product((1, 3), ("load", "both", "compute")):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
            cache.prefill(IDS[:, : first * CHUNK], whole=True)
            check(family, generate(model, cache), f"{first} {strategy}")
            if strategy == "load":
                report = cache.report  # of both parts; recurrent states are computed where no snapshot is stored
                assert report.chunks_loaded + report.chunks_computed == CHUNKS
                assert report.chunks_loaded >= CHUNKS - first * (family in RECURRENT)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_turn_after_some_generation(family: str) -> None:
    """Off the grid: cut into chunks as `generate` would, and nothing of it stored."""
    model: Any = family_model(family)
    more, results = prompt(2 * CHUNK + 5, seed=9), []
    store = filled_store(model, IDS)
    cake = CakeCache(model, store, chunk_size=CHUNK)
    for cache, options in ((DynamicCache(config=model.config), {"prefill_chunk_size": CHUNK}), (cake, {})):
        first = generate(model, cache, **options)
        longer = torch.cat([first.tokens, more], dim=1)
        if options:
            run_ahead(model, longer, cache)
        results.append(generate(model, cache, longer, attention_mask=torch.ones_like(longer)))
    cake.close()
    assert difference(*results) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_goes_on_by_itself(family: str) -> None:
    model = family_model(family)
    with CakeCache(model, filled_store(model, IDS), chunk_size=CHUNK) as cache:
        cache.prefill(IDS)
        copied = copy.deepcopy(cache)
        check(family, generate(model, copied), "copy")
        check(family, generate(model, cache), "original")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 2])
def test_a_last_piece_that_fails_leaves_the_cache_as_it_was(family: str, first: int) -> None:
    model = family_model(family)
    store = filled_store(model, IDS)

    def fail(module: object, args: object, output: object) -> None:
        raise MemoryError("no room")

    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        if first:
            cache.prefill(IDS[:, : first * CHUNK], whole=True)
        before = content(cache) if first else {}
        head = model.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_hook(reads_only(fail))
        with pytest.raises(MemoryError, match="no room"):
            generate(model, cache)
        handle.remove()
        assert cache.get_seq_length() == first * CHUNK
        after = content(cache) if first else {}
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        check(family, generate(model, cache), "again")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_abandoned_read_changes_nothing_when_it_ends(family: str) -> None:
    """A read that was given up writes garbage when all is over."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    for index, strategy in itertools.product((2, 5), ("load", "both")):
        stalled = FaultStore(store, {keys_by_index(store)[index]: "stall"})
        with CakeCache(model, stalled, chunk_size=CHUNK, strategy=strategy, save=False) as cache:
            with no_waiting_for(stalled):
                cache.prefill(IDS)
            stalled.release()
            join_loaders()
            check(family, generate(model, cache), f"{index} {strategy}")


@pytest.mark.parametrize("family", here("gemma3", "qwen3_next"))
def test_prompts_at_once(family: str) -> None:
    """Two prompts that begin alike, one of which wants only the windows of a chunk's end that the other one has no use for."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    runs: dict[int, Any] = {}

    def ask(tokens: int) -> None:
        with torch.no_grad(), CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
            cache.prefill(IDS[:, :tokens])
            runs[tokens] = content(cache)

    lengths = [len_ * CHUNK + 1 for len_ in (2, 3, 4, 5, 6)]
    threads = [threading.Thread(target=ask, args=(tokens,)) for tokens in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for tokens in lengths:
        alone = CakeCache(model, store, chunk_size=CHUNK, save=False, strategy="compute")
        alone.prefill(IDS[:, :tokens])
        kept = content(alone)
        alone.close()
        assert kept.keys() == runs[tokens].keys()
        assert all(torch.equal(tensor, runs[tokens][name]) for name, tensor in kept.items()), tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_after_reset_a_cache_takes_another_number_of_rows(family: str) -> None:
    model, store = family_model(family), filled_store(family_model(family), IDS)
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
        for rows in (1, 2, 1, 3, 1):
            answers = generate(model, cache, IDS.repeat(rows, 1))
            assert torch.equal(answers.tokens, answers.tokens[:1].repeat(rows, 1))
            if rows == 1:
                check(family, answers, "alone")
            cache.reset()


@pytest.mark.parametrize("family", RECURRENT)
def test_what_prompts_share_gets_a_state_of_its_own(family: str) -> None:
    """The second prompt finds that it shares a beginning with the first; from the third on it is loaded."""
    model, store = family_model(family), MemoryStore()
    shared = 3
    questions = [torch.cat([IDS[:, : shared * CHUNK], prompt(2 * CHUNK + 3, seed=seed)], dim=1) for seed in (5, 6, 7)]
    for turn, ids in enumerate(questions):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            run = generate(model, cache, ids)
            assert cache.flush(60)
            report = cache.report
        assert difference(run, oracle(family, ids)) == ""
        assert (report.chunks_loaded, report.states_loaded) == ((shared, 1) if turn == 2 else (0, 0))
        assert report.states_saved == (2 if turn == 1 else 1)
        assert (report.reason_code == "no-snapshot") == (turn == 1)


@pytest.mark.parametrize("family", RECURRENT)
def test_snapshots_every_so_often(family: str) -> None:
    model, store = family_model(family), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK, snapshot_every=2) as saving:
        saving.prefill(IDS, whole=True)
        assert saving.flush(60)
        assert saving.report.states_saved == CHUNKS // 2
    ids = torch.cat([IDS[:, : 5 * CHUNK], prompt(CHUNK, seed=5)], dim=1)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        run = generate(model, cache, ids)
        assert (cache.report.chunks_loaded, cache.report.chunks_computed) == (4, 1)
    assert difference(run, oracle(family, ids)) == ""


@pytest.mark.parametrize("family", here("deepseek_v32", "glm_moe_dsa"))
@pytest.mark.parametrize("strategy", ["load", "both"])
@pytest.mark.parametrize("fault", ["", "error"])
@pytest.mark.parametrize("method", ["update", "update_indexer"])
def test_an_indexer_waits_for_its_layer_too(
    family: str, strategy: str, fault: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upper layer of the last chunk comes, or fails, when the lower one has taken in the first of K, V and indexer."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    rules = told(no, ranges=in_ranges(2))
    gate = GateStore(BadRange(store, 1, fault), ranges=True)
    gate.open(CHUNKS)  # all chunks but the last one to be loaded, and its lower layer
    settled, settle, update = threading.Event(), Frontier.settle, getattr(IndexedLayer, method)

    def settling(frontier: Frontier, index: int, *how: Any) -> bool:
        counts = settle(frontier, index, *how)
        if index == 0:
            settled.set()
        return counts

    def updating(layer: IndexedLayer, *states: torch.Tensor, **kwargs: Any) -> Any:
        found = update(layer, *states, **kwargs)
        gate.open()
        assert settled.wait(60)
        return found

    monkeypatch.setattr(Frontier, "settle", settling)
    limits = Limits.from_environment(loader_threads=1)
    with CakeCache(model, gate, chunk_size=CHUNK, strategy=strategy, save=False, limits=limits, rules=rules) as cache:
        monkeypatch.setattr(IndexedLayer, method, updating)
        check(family, generate(model, cache), fault)
        report = cache.report
    assert (report.chunks_computed, report.chunks_failed) == ((1, 1) if fault else (0, 0))


class CountingStore(WrapperStore):
    """Adds up the bytes that are read."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.count = 0
        self.reads = 0
        self._lock = threading.Lock()

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        self._add(parts)
        return super().read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        self._add(parts)
        return super().read_range(key, parts, offset)

    def _add(self, parts: Sequence[memoryview]) -> None:
        with self._lock:
            self.count += sum(part.nbytes for part in parts)
            self.reads += 1


def test_of_windows_only_the_last_is_read() -> None:
    model = family_model("gemma3")
    tokens = 16 * WINDOW
    ids = prompt(tokens + 1)
    store = CountingStore(filled_store(model, ids))
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as cache:
        assert difference(generate(model, cache, ids), oracle("gemma3", ids)) == ""
        layout, report = cache._session.bound_model.layout(), cache.report
    assert report.chunks_loaded == tokens // CHUNK
    payload = store.count - store.reads * header_size(layout)
    assert payload == report.bytes_loaded
    per_token = [piece.token_bytes for piece in layout.pieces]
    full, windowed = sum(per_token[: layout.everywhere]), sum(per_token[layout.everywhere :])
    assert windowed > full  # so that there is something to be saved
    assert payload <= 1.1 * (tokens * full + WINDOW * windowed)


def test_after_a_restore_a_window_is_all_that_is_kept() -> None:
    model = family_model("mistral")
    with CakeCache(model, filled_store(model, IDS), chunk_size=CHUNK) as cache:
        cache.prefill(IDS)
        for layer in cache.layers:
            assert layer.keys.shape[-2] == WINDOW - 1
            assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * layer.keys.element_size()


@pytest.mark.parametrize("family", here("gemma3", "qwen3_next", "deepseek_v32"))
def test_a_flipped_bit_that_passes_the_checks_changes_the_result(family: str) -> None:
    """Negative control: with a checksum made to fit, one flipped bit in the last piece that is read must show."""
    model, store = family_model(family), filled_store(family_model(family), IDS)
    is_state = family in RECURRENT
    key = keys_by_index(store, states=is_state)[CHUNKS - 1]
    value = store.read(key)
    assert value is not None
    last = -1 - len(value) % 4

    def flip(payload: bytearray) -> None:
        payload[last] ^= 1  # of an exponent, of the last value of all

    store.write(key, [forge(value, flip)], replace=True)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as deceived:
        run = generate(model, deceived)
        assert deceived.report.chunks_loaded == CHUNKS
    assert difference(run, expected(family)) != ""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mode", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_other_ways_to_generate(family: str, mode: dict[str, Any]) -> None:
    """Restored or not, the tokens are the same, or it fails alike."""
    model: Any = family_model(family)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **mode}
    results: list[Any] = []
    with CakeCache(model, filled_store(model, IDS), chunk_size=CHUNK) as cake:
        for cache in (DynamicCache(config=model.config), cake):
            torch.manual_seed(3)
            try:
                results.append(model.generate(IDS, **given(cache), **options).tolist())
            except (ValueError, RuntimeError, AttributeError) as error:
                results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.parametrize("family", [*FAMILIES, *here("deepseek_v32", "gemma4", "granitemoehybrid", "nemotron_h")])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_bfloat16(family: str, attention: str) -> None:
    """Where the states of one layer may be of several dtypes."""
    model: Any = copy.deepcopy(family_model(family)).to(torch.bfloat16)
    model.set_attn_implementation(attention)
    reference = generate(model, DynamicCache(config=model.config), prefill_chunk_size=CHUNK)
    store = filled_store(model, IDS)
    for strategy, loaded in (("load", CHUNKS), ("both", None), ("compute", 0)):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
            assert difference(generate(model, cache), reference) == "", strategy
            assert loaded in (None, cache.report.chunks_loaded)


@pytest.mark.skipif(not RECURRENT, reason="this version keeps no recurrent states in a form that can be restored")
def test_a_model_that_forgets_is_found_out() -> None:
    """Also where its weights are such that its logits hardly show it."""
    torch.manual_seed(0)
    assert forgets(BUILDERS["jamba"]())
    assert forgets(copy.deepcopy(family_model("jamba")).to(torch.bfloat16))
    for family in RECURRENT:
        torch.manual_seed(0)
        assert not forgets(BUILDERS[family]())
        assert not forgets(copy.deepcopy(family_model(family)).to(torch.bfloat16))


def test_on_a_device_windows_come_through_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place that serves GPUs, here between two parts of host memory."""
    monkeypatch.setattr("cake_hf.restore.restore.place_for", DevicePlace)
    for family, strategy in itertools.product(here("gemma3", "mistral", "falcon_h1"), ("load", "both")):
        model = family_model(family)
        with CakeCache(model, filled_store(model, IDS), chunk_size=CHUNK, strategy=strategy) as cache:
            check(family, generate(model, cache), strategy)
