"""Continuous batching with a store: the same tokens, and in the blocks the KV of `generate`, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cake_hf import CakeCache, MemoryStore
from engine_runs import (
    CHUNKS,
    COMPANY,
    DOCUMENT,
    SHORT,
    alike,
    engine_config,
    generated_kv,
    is_restored,
    needs_engine,
    plain_company,
    served,
    stepping,
)
from models import CHUNK, shared_model
from stored import filled_store, without
from waiting import PATIENCE

pytestmark = needs_engine

IDS = torch.tensor([DOCUMENT])


def stored_document(model: Any) -> MemoryStore:
    """A store with the document's chunks, from `generate`'s side."""
    return filled_store(model, IDS)


@pytest.mark.parametrize("page", [CHUNK, CHUNK // 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("missing", [range(CHUNKS), (), (0, 1), (2, 5)], ids=["cold", "warm", "front", "holes"])
def test_kv_in_the_blocks_is_generate_s(dtype: str, page: int, missing: Any) -> None:
    model = shared_model("llama", dtype)
    store = without(stored_document(model), *missing)
    with stepping(model, store, engine=engine_config(page)) as steps:
        for number, ids in enumerate(SHORT):
            steps.add(f"short {number}", ids)
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        assert alike(steps.kv("document", CHUNKS), generated_kv(dtype))
        steps.run()
        if dtype == "float32":
            assert steps.tokens("document") == plain_company()[1]


def test_what_a_mixed_step_computes_differs_and_is_not_saved() -> None:
    """The negative control: in company the engine rounds otherwise, so the comparison above can fail."""
    model = shared_model("llama")
    with stepping(model, MemoryStore(), exact=False) as steps:
        for number, ids in enumerate(SHORT):
            steps.add(f"short {number}", ids)
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        made = steps.kv("document", CHUNKS)
        assert not alike(made, generated_kv())
        close = zip(made, generated_kv(), strict=True)
        assert all(torch.allclose(a.view(torch.float32), b.view(torch.float32), atol=1e-4) for a, b in close)
    store = MemoryStore()
    with stepping(model, store, engine=engine_config(CHUNK // 2)) as steps:
        steps.add("plain", DOCUMENT[: CHUNK - 2])  # shares a block with the document's first chunk
        steps.add("company", SHORT[1])
        steps.run()
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        assert alike(steps.kv("document", CHUNKS), generated_kv())
        steps.run()
    assert len(list(store.keys())) == CHUNKS


@pytest.mark.parametrize("page", [CHUNK, CHUNK // 4])
def test_a_store_is_shared_with_generate_both_ways(page: int) -> None:
    model = shared_model("llama")
    tokens, reports = served(model, COMPANY, stored_document(model), engine=engine_config(page), strategy="load")
    assert (tokens, reports[1].chunks_loaded) == (plain_company(), CHUNKS)
    store = MemoryStore()
    served(model, COMPANY, store, engine=engine_config(page))
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        cache.prefill(IDS, whole=True)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS, 0)
        made = [
            one[0, :, : CHUNKS * CHUNK].transpose(0, 1).contiguous().view(torch.uint8).reshape(-1)
            for layer in cache.layers
            for one in (layer.keys, layer.values)
        ]
    assert alike(made, generated_kv())


def test_encoded_chunks_are_restored_too() -> None:
    """The last chunk is stored as it is, the others are encoded."""
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK, codec="lossless") as cache:
        cache.prefill(IDS[:, : (CHUNKS - 1) * CHUNK], whole=True)
        cache.flush()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(IDS, whole=True)
        cache.flush()
    raw = max(store.size(key) or 0 for key in store.keys())  # noqa: SIM118  # a store is no mapping
    assert sum((store.size(key) or 0) < raw for key in store.keys()) == CHUNKS - 1  # noqa: SIM118
    with stepping(model, store, strategy="load") as steps:
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        assert alike(steps.kv("document", CHUNKS), generated_kv("bfloat16"))
        steps.run()
        report = steps.manager.report("document")
        assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS, 0)
        assert steps.manager._requests.desk.wait(PATIENCE)
        session = steps.manager._session
        costs = session.cost_memory(session.bound_model.namespace()).costs()
    assert costs.codec is not None  # what was encoded was not taken for raw chunks that came sooner
    assert costs.load is not None
    assert costs.load.chunk_bytes < raw


def test_warm_alone_is_cold_alone() -> None:
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    answers = [
        served(model, [DOCUMENT], store, strategy=strategy)[0] for strategy in ("both", "load", "both", "compute")
    ]
    assert answers[1:] == answers[:-1]


def test_an_engine_that_rounds_otherwise_has_chunks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from cake_hf.serving import manager

    monkeypatch.setattr(manager, "computes_as_generate", lambda *about: False)
    model = shared_model("llama")
    store = stored_document(model)
    for loaded in (0, CHUNKS):
        tokens, reports = served(model, COMPANY, store, strategy="load")
        assert (tokens, reports[1].chunks_loaded) == (plain_company(), loaded)
    assert len(list(store.keys())) > CHUNKS


def test_a_step_leaves_the_model_s_config_alone() -> None:
    """Else a forward in another thread, meanwhile, would attend to later tokens."""
    model = shared_model("llama")
    seen = []

    def look(*about: Any) -> None:
        seen.append(hasattr(model.config, "is_causal"))

    hook: Any = torch.nn.Module.register_forward_pre_hook(model.model.layers[0], look)
    from cake_hf import reads_only

    reads_only(look)
    try:
        with stepping(model, MemoryStore()) as steps:
            steps.add("document", DOCUMENT)
            steps.add("short", SHORT[0])
            steps.run()
    finally:
        hook.remove()
    assert seen
    assert not any(seen)
