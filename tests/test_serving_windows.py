"""Continuous batching with sliding windows: the same tokens, and in windows and stores the KV of `generate`, bit for bit."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeCache, MemoryStore
from cake_hf.testing import FaultStore, GateStore, expected_faults
from engine_runs import (
    CHUNKS,
    COMPANY,
    DOCUMENT,
    SHORT,
    Stepper,
    alike,
    engine_config,
    is_restored,
    needs_engine,
    plain,
    served,
    stepping,
    whole,
)
from families import family_model
from models import CHUNK, run_ahead
from naming import given
from stored import filled_store, keys_in_order, values_of, without

pytestmark = needs_engine

IDS = torch.tensor([DOCUMENT])
END = CHUNK * CHUNKS
SHORTER, LONGER, LONGEST = 10, 24, 40
"""Windows, in tokens: within a chunk, within two, and within three."""

KINDS = [("gemma3", SHORTER), ("gemma3", LONGEST), ("mistral", SHORTER), ("mistral", LONGER)]
"""Windows in some layers, and in all."""


@cache
def windowed(family: str, window: int, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose windows have that length. Leave it as it is."""
    config = copy.deepcopy(family_model(family).config)
    config.sliding_window = window
    torch.manual_seed(0)
    return type(family_model(family))(config).to(dtype).eval()


@cache
def answers(family: str, window: int) -> list[list[int]]:
    """The answers to `COMPANY` of transformers' own engine."""
    return plain(windowed(family, window), COMPANY)


def as_bytes(kept: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, head_dim]` as flat bytes."""
    return kept.contiguous().view(torch.uint8).reshape(-1)


def expected_kv(model: Any, first: int, *, chunk: int = CHUNK) -> list[torch.Tensor]:
    """The KV of the document's chunks: whole where a layer keeps it, and from token `first` on in a window."""
    kept = DynamicCache(config=model.config)
    if chunk == CHUNK:
        run_ahead(model, IDS[:, : END + 1], kept)
    else:
        with torch.no_grad():
            model(IDS[:, :END], **given(kept))
    found = []
    for layer in kept.layers:
        for tensor in (layer.keys, layer.values):
            tokens = END - first if layer.is_sliding else END
            found.append(as_bytes(tensor[0].transpose(0, 1)[-tokens:]))
    return found


def first_in_window(steps: Stepper) -> int:
    """The first token of the document that its next token attends to in a window."""
    return max(0, int(steps.engine.active()["document"].position_offset) - steps.engine.window + 1)


def kv_in_memory(steps: Stepper) -> list[torch.Tensor]:
    """The KV of the document's chunks in the engine's memory, in the form of `expected_kv`."""
    engine, layers = steps.engine, steps.manager._session.bound_model.layout().layers
    everywhere = steps.manager._session.bound_model.layout().everywhere
    blocks = engine.parts("document", 0, END, everywhere)
    full = iter([torch.cat([block[piece] for block in blocks]).clone() for piece in range(everywhere)])
    first = first_in_window(steps)
    slots = torch.tensor(engine._ring.get_write_indices("document", first, END - first))
    found = []
    for layer in range(layers):
        views = engine._ring._kv_token_views.get(layer)
        found += [next(full), next(full)] if views is None else [as_bytes(view[slots]) for view in views]
    return found


@pytest.mark.parametrize(("family", "window"), KINDS)
@pytest.mark.parametrize(
    ("missing", "strategy"),
    [(range(CHUNKS), "both"), ((), "both"), ((), "load"), ((0, 1), "load"), ((2, 5), "load"), ((1, 4), "load")],
    ids=["cold", "both", "warm", "front", "end", "holes"],
)
def test_kv_in_memory_is_generate_s(family: str, window: int, missing: Any, strategy: str) -> None:
    model = windowed(family, window)
    store = without(filled_store(model, IDS), *missing)
    page = CHUNK // 2 if window == LONGEST else CHUNK
    with stepping(model, store, engine=engine_config(page), strategy=strategy) as steps:
        for number, ids in enumerate(SHORT):
            steps.add(f"short {number}", ids)
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        made = kv_in_memory(steps)
        assert alike(made, expected_kv(model, first_in_window(steps)))
        assert not alike(made, expected_kv(model, first_in_window(steps), chunk=END))  # one forward rounds otherwise
        steps.run()
        assert steps.tokens("document") == answers(family, window)[1]
        assert steps.manager.flush()
        assert whole(steps)
    assert values_of(store).keys() == values_of(filled_store(model, IDS)).keys()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        cache.prefill(IDS, whole=True)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS, 0)


@pytest.mark.parametrize(("family", "window"), KINDS)
def test_what_is_saved_is_what_generate_saves(family: str, window: int) -> None:
    model, store = windowed(family, window, torch.bfloat16), MemoryStore()
    served(model, COMPANY, store)
    mine, its = values_of(store), values_of(filled_store(model, IDS))
    assert mine.keys() == its.keys()
    size = 1024
    assert all(mine[key][-size:] == its[key][-size:] and len(mine[key]) == len(its[key]) for key in its)


@pytest.mark.parametrize(("family", "window"), KINDS)
def test_only_the_last_window_is_read(family: str, window: int) -> None:
    model = windowed(family, window)
    tokens, reports = served(model, COMPANY, filled_store(model, IDS), strategy="load")
    assert tokens == answers(family, window)
    assert (reports[1].chunks_loaded, reports[1].chunks_computed) == (CHUNKS, 0)
    layers = [layer.is_sliding for layer in DynamicCache(config=model.config).layers]
    with_windows = -(-(window - 1) // CHUNK)
    per_layer = reports[1].bytes_loaded / (CHUNKS * layers.count(False) + with_windows * layers.count(True))
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    assert per_layer == 2 * CHUNK * heads * head_dim * 4


@pytest.mark.fault(
    "KV",
    "In continuous batching, a model has sliding windows, and a chunk behind loaded ones cannot be used.",
    "Chunks before it are computed again where their windows were not loaded. The answer is the same.",
)
@pytest.mark.parametrize(("family", "window"), KINDS)
@pytest.mark.parametrize("place", [0, 2, CHUNKS - 2, CHUNKS - 1], ids=["first", "middle", "before", "last"])
def test_a_chunk_that_cannot_be_used_is_computed(family: str, window: int, place: int) -> None:
    model = windowed(family, window)
    inner = filled_store(model, IDS)
    store = FaultStore(inner, {keys_in_order(inner)[place]: "flip"})
    with expected_faults(), stepping(model, store, strategy="load") as steps:
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        assert alike(kv_in_memory(steps), expected_kv(model, first_in_window(steps)))
        steps.run()
        report: Any = steps.manager.report("document")
        assert steps.tokens("document") == answers(family, window)[1]
        assert report.restored == CHUNKS
        assert whole(steps)


@pytest.mark.parametrize(("family", "window"), KINDS)
def test_steps_of_a_chunk_alone_without_exact_too(family: str, window: int) -> None:
    """What a mixed step gives to windows is not seen, so their models always get steps of a chunk alone."""
    model, store = windowed(family, window), MemoryStore()
    for loaded in (0, CHUNKS):
        tokens, reports = served(model, COMPANY, store, exact=False, strategy="load")
        assert (tokens, reports[1].chunks_loaded) == (answers(family, window), loaded)


@pytest.mark.parametrize(("family", "window"), KINDS)
def test_encoded_chunks_are_restored_too(family: str, window: int) -> None:
    model, store = windowed(family, window, torch.bfloat16), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK, codec="lossless") as cache:
        cache.prefill(IDS, whole=True)
        cache.flush()
    raw = values_of(filled_store(model, IDS))
    assert all(len(value) < len(raw[key]) for key, value in values_of(store).items())
    with stepping(model, store, strategy="load") as steps:
        steps.add("document", DOCUMENT)
        steps.run(until=lambda: is_restored(steps))
        assert alike(kv_in_memory(steps), expected_kv(model, first_in_window(steps)))
        steps.run()
        report: Any = steps.manager.report("document")
        assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS, 0)


@pytest.mark.parametrize(("family", "window"), KINDS)
def test_little_memory_and_a_request_that_is_cancelled_while_it_loads(family: str, window: int) -> None:
    model, store = windowed(family, window), GateStore(filled_store(windowed(family, window), IDS))
    with stepping(model, store, engine=engine_config(blocks=8), strategy="load") as steps:
        steps.add("cancelled", DOCUMENT)
        steps.step()
        store.await_begun(1)
        store.open(2)
        store.await_reads(2)
        steps.step()
        steps.manager.cancel_request("cancelled")
        steps.step()
        assert whole(steps)
        names = [f"{number}" for number in range(len(COMPANY))] + ["again"]
        for name, ids in zip(names, [*COMPANY, DOCUMENT], strict=True):
            steps.add(name, ids)
        store.open()  # what was read for the cancelled one comes now
        steps.run()
        assert [steps.tokens(name) for name in names] == [*answers(family, window), answers(family, window)[1]]
        assert whole(steps)


def test_the_memory_for_windows_does_not_grow_with_the_prompt() -> None:
    for family, blocks, room in (("gemma3", 9, 24 * CHUNK), ("mistral", 9, None)):
        with stepping(windowed(family, LONGER), MemoryStore(), engine=engine_config(blocks=blocks)) as steps:
            assert steps.engine.room == room
            if room is not None:
                with pytest.raises(ValueError, match=f"has room for {room}"):
                    steps.manager.add_request([3] * room)
            else:
                steps.add("long", [3] * (30 * CHUNK))
                steps.run()
                assert len(steps.tokens("long")) == 5
