"""Encoded chunks that come late, in parts, or with faults: the answer is the one without a cache, and all is counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeCache, Limits, MemoryStore, Store
from cake_hf.chunks.encoded_header import encoded_header_size, is_encoded
from cake_hf.stores.eviction import START_BYTES, place_in
from cake_hf.testing import FaultStore, Rules, WrapperStore
from cake_hf.testing.forgery import forge, one_bit
from cake_hf.transfer.single_reads import read_facts
from families import WINDOW, family_model
from family_runs import difference as family_difference
from family_runs import generate
from hanging import no_waiting_for
from models import CHUNK, CHUNKS, Outcome, build, difference, oracle, prompt, run
from paces import in_ranges
from stored import chunks_of, key_in, values_of
from test_lossless_cache import copy_of, model_of, newer
from waiting import PATIENCE, join_loaders

PATIENT = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)


@cache
def expected() -> Outcome:
    return oracle(model_of(), prompt())


def keys() -> list[str]:
    """Of the prompt's chunks, in order."""
    found = chunks_of(copy_of())
    return [key_in(found[index]) for index in range(CHUNKS)]


def warm_run(store: Store, codec: str = "lossless", strategy: str = "load", **options: Any) -> tuple[Outcome, Any]:
    with CakeCache(
        model_of(), store, chunk_size=CHUNK, codec=codec, strategy=strategy, limits=PATIENT, **options
    ) as warm:
        outcome = run(model_of(), prompt(), warm)
        assert warm.flush(60)
        return outcome, warm.report


@pytest.mark.parametrize("codec", ["none", "lossless"])
@pytest.mark.parametrize("position", [0, 3, CHUNKS - 1])
@pytest.mark.parametrize("fault", ["drop", "truncate", "flip", "error", "tear"])
def test_one_fault(fault: str, position: int, codec: str) -> None:
    store = copy_of()
    if fault == "tear":
        key = keys()[position]
        store.write(key, [chunks_of(store)[position][: -len(chunks_of(store)[position]) // 2]], replace=True)
        outcome, report = warm_run(store, codec)
    else:
        outcome, report = warm_run(FaultStore(store, {keys()[position]: fault}), codec)
    assert difference(outcome, expected()) == ""
    assert (report.chunks_loaded, report.chunks_computed) == (CHUNKS - 1, 1)
    assert (report.chunks_missed, report.chunks_failed) == ((1, 0) if fault == "drop" else (0, 1))
    outcome, report = warm_run(store)
    assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS, 0)
    assert difference(outcome, expected()) == ""


def test_a_lie_is_believed() -> None:
    """Negative control: no checksum finds a well-formed chunk that no model made, so the results differ."""
    outcome, report = warm_run(FaultStore(copy_of(), dict.fromkeys(keys(), "lie")))
    assert report.chunks_loaded == CHUNKS
    assert difference(outcome, expected()) != ""


@pytest.mark.parametrize("seed", range(6))
def test_random_faults(seed: int) -> None:
    outcome, report = warm_run(FaultStore(copy_of(), rate=0.5, seed=seed), strategy="both" if seed % 2 else "load")
    assert difference(outcome, expected()) == ""
    assert report.chunks_loaded + report.chunks_computed == CHUNKS


@pytest.mark.fault(
    "Time and bounds",
    "A read of an encoded chunk hangs, and returns when its prompt is over.",
    "It never writes to the KV.",
)
@pytest.mark.parametrize("position", [0, 4, CHUNKS - 1])
@pytest.mark.parametrize("brings", ["garbage", "the chunk"])
def test_a_late_read_writes_nowhere(position: int, brings: str) -> None:
    class Late(FaultStore):
        def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
            size = super().read_into(key, parts)
            return self.inner.read_into(key, parts) if brings == "the chunk" else size

    store = Late(copy_of(), {keys()[position]: "stall"})
    model = model_of()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", codec="lossless", limits=PATIENT) as warm:
        with no_waiting_for(store):
            outcome = run(model, prompt(), warm)
        assert difference(outcome, expected()) == ""
        assert (warm.report.chunks_failed, warm.report.chunks_loaded) == (1, CHUNKS - 1)
        store.release()
        join_loaders()
        for layer, before, values_before in zip(warm.layers, outcome.keys, outcome.values, strict=True):
            assert torch.equal(layer.keys, before)
            assert torch.equal(layer.values, values_before)


class Replacing(WrapperStore):
    """Replaces each chunk by the other form just before it is read, as `cake-hf recode` may."""

    def __init__(self, inner: Store, other: dict[str, bytes]) -> None:
        super().__init__(inner)
        self.other = dict(other)

    def _replace(self, key: str) -> None:
        if value := self.other.pop(key, None):
            self.inner.write(key, [value], replace=True)

    def size(self, key: str) -> int | None:
        size = super().size(key)
        self._replace(key)
        return size

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        self._replace(key)
        return self.inner.read_into(key, parts)


@pytest.mark.fault("Stores", "A chunk is recoded between two questions of its reader.", "It is read again, and loaded.")
@pytest.mark.parametrize("begin", ["none", "lossless"])
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_chunks_that_are_replaced_meanwhile(begin: str, codec: str) -> None:
    other = values_of(copy_of("lossless" if begin == "none" else "none"))
    outcome, report = warm_run(Replacing(copy_of(begin), other), codec)
    assert difference(outcome, expected()) == ""
    assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS, 0)


# What is compared.


def test_facts_are_those_of_the_kv() -> None:
    layout = None
    with CakeCache(model_of(), MemoryStore(), chunk_size=CHUNK) as cache:
        layout = cache._session.bound_model.layout()
    raw, encoded = copy_of("none"), copy_of()
    assert [read_facts(raw, key, layout) for key in keys()] == [read_facts(encoded, key, layout) for key in keys()]
    assert read_facts(encoded, "0" * 40, layout) is None


@pytest.mark.fault(
    "KV",
    "Encoded chunks hold another model's KV, and all is well-formed.",
    "The audit finds it; nothing more is loaded.",
)
@pytest.mark.parametrize("lies", [False, True])
def test_the_audit_compares_with_encoded_chunks(lies: bool) -> None:
    store = MemoryStore()
    for key, value in values_of(copy_of()).items():
        store.write(key, [forge(value, one_bit) if lies else value])
    model = build("llama", "bfloat16")  # nothing that is found out about it concerns others
    with CakeCache(model, store, chunk_size=CHUNK, strategy="compute", codec="lossless", limits=PATIENT) as cache:
        assert difference(run(model, prompt(), cache), expected()) == ""
        assert cache.report.reason_code == ("differs-from-store" if lies else "")


# Parts of chunks.


class Counting(WrapperStore):
    """Counts the bytes that are read."""

    nbytes = 0

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        size = self.inner.read_into(key, parts)
        self.nbytes += size or 0
        return size

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        self.nbytes += sum(part.nbytes for part in parts)
        return self.inner.read_range(key, parts, offset)


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("ranges", [True, False])
def test_of_windows_only_the_last_is_read(ranges: bool) -> None:
    model: Any = family_model("gemma3", torch.bfloat16)
    ids = prompt(8 * WINDOW + 1)
    plain = oracle(model, ids)
    stores = {codec: MemoryStore() for codec in ("none", "lossless")}
    read = {}
    for codec, store in stores.items():
        with CakeCache(model, store, chunk_size=CHUNK, codec=codec) as cache:
            cache.prefill(ids, whole=True)
            assert cache.flush(60)
        counting = Counting(store)
        counting.reads_ranges = ranges
        with CakeCache(model, counting, chunk_size=CHUNK, codec=codec, strategy="load", save=False) as cache:
            assert difference(run(model, ids, cache), plain) == ""
            report, layout = cache.report, cache._session.bound_model.layout()
        assert (report.chunks_loaded, report.chunks_failed) == (8 * WINDOW // CHUNK, 0)
        header = encoded_header_size(layout) if codec == "lossless" else 4096
        read[codec] = counting.nbytes - report.chunks_loaded * header
    if ranges:
        assert read["lossless"] < read["none"]


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_layer_by_layer(codec: str) -> None:
    for form in ("none", "lossless"):
        outcome, report = warm_run(copy_of(form), codec, rules=Rules(ranges=in_ranges(3)))
        assert difference(outcome, expected()) == ""
        assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS, 0)


def test_costs_are_learnt_from_what_came_over_the_line() -> None:
    store = copy_of()
    for _ in range(3):
        warm_run(store)
    with CakeCache(model_of(), store, chunk_size=CHUNK) as cache:
        load = cache._session.cost_memory(cache._session.bound_model.namespace()).costs().load
    assert load is not None
    sizes = [len(value) for value in chunks_of(store).values()]
    assert load.chunk_bytes == pytest.approx(sum(sizes) / len(sizes), rel=0.01)


def test_eviction_finds_the_place_of_an_encoded_chunk() -> None:
    found = chunks_of(copy_of())
    for index, value in found.items():
        place = place_in(value[:START_BYTES])
        assert place is not None
        assert (place.index, place.parent == key_in(found[index - 1]) if index else True) == (index, True)


@pytest.mark.filterwarnings("ignore")
def test_a_newer_snapshot_is_not_replaced() -> None:
    model: Any = family_model("lfm2", torch.bfloat16)
    ids, store = prompt(5 * CHUNK + 3), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK, codec="lossless") as cache:
        cache.prefill(ids, whole=True)
        assert cache.flush(60)
    raw = {key: value for key, value in values_of(store).items() if not is_encoded(value)}
    assert raw
    for key, value in raw.items():
        store.write(key, [newer(bytearray(value))], replace=True)
    before = {key: store.read(key) for key in raw}
    with CakeCache(model, store, chunk_size=CHUNK, codec="lossless", strategy="load") as cache:
        answer = generate(model, cache, ids)
        assert cache.flush(60)
    plain = generate(model, DynamicCache(config=model.config), ids, prefill_chunk_size=CHUNK)
    assert family_difference(answer, plain) == ""
    assert {key: store.read(key) for key in raw} == before
