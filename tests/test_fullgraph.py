"""Models that are compiled as one graph, with nothing of ours in it: prompts are restored in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from cake_hf import CakeCache, MemoryStore
from models import CHUNK, prompt
from naming import given
from old_versions import OLD
from test_compiled import CHUNKS, IDS, WAYS, generated, itself, layers, module, tiny

pytestmark = pytest.mark.skipif(OLD, reason="older versions of transformers are compiled in other ways")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def by_hand(model: Any, cache: Any, ids: torch.Tensor = IDS, steps: int = 2) -> list[torch.Tensor]:
    """The logits of a prompt and of tokens behind it, one call each."""
    with torch.no_grad():
        found = [model(ids, **given(cache), logits_to_keep=1).logits]
        for _ in range(steps):
            found.append(model(found[-1][:, -1].argmax(-1, keepdim=True), **given(cache), logits_to_keep=1).logits)
    return found


def expected_by_hand(steps: int = 2) -> list[torch.Tensor]:
    with CakeCache(tiny(), MemoryStore(), chunk_size=CHUNK) as cache:
        return by_hand(cache._session.model, cache, steps=steps)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.fault(
    "Model",
    "The model, its forward or its layers are compiled as one graph (`fullgraph=True`).",
    "Prompts are restored in front of the graph, which holds no more than with a `DynamicCache`.",
)
@pytest.mark.parametrize("way", WAYS)
def test_calls_of_a_model_that_is_one_graph(way: Callable[..., Any]) -> None:
    expected = expected_by_hand()
    model, store = way(tiny(), fullgraph=True), MemoryStore()
    for strategy in ("compute", "load"):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
            assert equal(by_hand(model, cache), expected)
            report = cache.report
        assert (report.chunks_computed, report.chunks_loaded) == ((CHUNKS, 0) if strategy == "compute" else (0, CHUNKS))


def test_new_caches_cost_no_new_graphs() -> None:
    model, store, graphs = itself(tiny(), fullgraph=True), MemoryStore(), []
    for _ in range(4):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            by_hand(model, cache)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == graphs[1:2] * 3
    assert graphs[-1] <= 4


def test_a_backend_that_looks_at_what_is_written_to() -> None:
    model, store = itself(tiny(), fullgraph=True, backend="aot_eager"), MemoryStore()
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            assert equal(by_hand(model, cache), expected_by_hand())


def test_a_model_that_is_compiled_after_its_cache_was_made() -> None:
    """`generate` asks the cache for its length first."""
    expected = generated(tiny(), DynamicCache(config=tiny().config), prefill_chunk_size=CHUNK)
    model = tiny()
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        itself(model, fullgraph=True)
        assert torch.equal(generated(model, cache), expected)
        assert cache.report.chunks_computed == CHUNKS


def test_what_cannot_be_seen_from_the_cache_is_told_in_a_sentence() -> None:
    """The cache knows nothing of the module around its model."""
    model = tiny()
    around = module(model, fullgraph=True)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with pytest.raises(
            RuntimeError, match=r"make the CakeCache after model.compile\(fullgraph=True\), or with what"
        ):
            by_hand(around, cache)
        assert equal(by_hand(model, cache), expected_by_hand())


def test_other_caches_beside_ours() -> None:
    model = itself(tiny(), fullgraph=True)
    expected = by_hand(tiny(), DynamicCache(config=tiny().config))
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert equal(by_hand(model, DynamicCache(config=tiny().config)), expected)
        assert equal(by_hand(model, cache), expected_by_hand())
    assert equal(by_hand(model, DynamicCache(config=tiny().config)), expected)


@pytest.mark.parametrize("way", [itself, layers])
def test_a_cache_that_is_closed_goes_on_as_a_plain_one(way: Callable[..., Any]) -> None:
    model = way(tiny(), fullgraph=True)
    cache = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
    cache.close()
    assert equal(by_hand(model, cache), by_hand(tiny(), DynamicCache(config=tiny().config)))


def test_batches_in_one_graph() -> None:
    ids = torch.cat([IDS, prompt(IDS.shape[1], seed=3)])
    with CakeCache(tiny(), MemoryStore(), chunk_size=CHUNK) as cache:
        expected = by_hand(cache._session.model, cache, ids)
    model, store = itself(tiny(), fullgraph=True), MemoryStore()
    for turn in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            assert equal(by_hand(model, cache, ids), expected)
            assert cache.report.chunks_loaded == turn * 2 * CHUNKS


def test_a_second_turn_goes_on_from_what_a_graph_has_left() -> None:
    more = torch.cat([IDS, prompt(2 * CHUNK, seed=4)], dim=1)
    model = itself(tiny(), fullgraph=True)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, torch.no_grad():
        by_hand(model, cache, steps=0)
        found = model(more[:, IDS.shape[1] :], **given(cache), logits_to_keep=1).logits
        assert cache.get_seq_length() == more.shape[1]
        expected = tiny()(more, logits_to_keep=1).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", [layers])
def test_an_interrupt_in_a_graph_leaves_what_was_before(
    way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here while it is traced; what a graph would have changed is put in place when it has ended."""
    model = way(tiny(), fullgraph=True)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        first = by_hand(model, cache, steps=2)
        length = cache.get_seq_length()
        token = first[-1][:, -1].argmax(-1, keepdim=True)

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr("torch._dynamo.convert_frame.compile_frame", interrupt)
            torch._dynamo.reset()
            with pytest.raises(KeyboardInterrupt):
                model(token, **given(cache), logits_to_keep=1)
        assert cache.get_seq_length() == length
        with torch.no_grad():
            assert torch.equal(model(token, **given(cache), logits_to_keep=1).logits, expected_by_hand(3)[3])
