"""Compiled models: a prompt is restored between the graphs, and the results are those on a `DynamicCache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cake_hf import CakeCache, MemoryStore
from cake_hf.model.foreign_code import as_it_is
from models import CHUNK, prompt
from naming import given
from old_versions import OLD

pytestmark = pytest.mark.skipif(OLD, reason="older versions of transformers are compiled in other ways")

OPTIONS: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CHUNKS = 1
"""Tracing takes seconds for each length that comes."""
IDS = prompt(CHUNKS * CHUNK + 7)


def forward(model: Any, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, **{"backend": "eager", **options})
    return model


def itself(model: Any, **options: Any) -> Any:
    model.compile(**{"backend": "eager", **options})
    return model


def layers(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**{"backend": "eager", **options})
    return model


def module(model: Any, **options: Any) -> Any:
    return torch.compile(model, **{"backend": "eager", **options})


WAYS = (forward, itself, layers, module)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny() -> Any:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def generated(model: Any, cache: Any, **options: Any) -> torch.Tensor:
    result = model.generate(IDS, **given(cache), **OPTIONS, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(result.logits)


@pytest.mark.fault(
    "Model",
    "The model is compiled: itself, its forward, its layers, or in a module of torch.compile.",
    "Chunks are computed and restored without the compiled code, bit for bit those of the plain model; the rest runs compiled.",
)
@pytest.mark.parametrize("way", WAYS)
def test_generate_on_a_compiled_model(way: Callable[..., Any]) -> None:
    """The backend runs the graphs with the same kernels as without them, so the oracle need not be compiled."""
    expected = generated(tiny(), DynamicCache(config=tiny().config), prefill_chunk_size=CHUNK)
    model, store = way(tiny()), MemoryStore()
    for strategy in ("compute", "load"):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
            assert torch.equal(generated(model, cache), expected)
            report = cache.report
        assert (report.chunks_computed, report.chunks_loaded) == ((CHUNKS, 0) if strategy == "compute" else (0, CHUNKS))
    assert bool(counters["stats"]["unique_graphs"]) is (
        way is not module
    )  # whose `generate` is that of the model in it
    plain = MemoryStore()
    with CakeCache(tiny(), plain, chunk_size=CHUNK) as cache:
        cache.prefill(IDS, whole=True)
    assert {key: store.read(key) for key in store.keys()} == {key: plain.read(key) for key in plain.keys()}  # noqa: SIM118


def test_a_last_piece_that_is_compiled_is_not_stored() -> None:
    """Full chunk or not: it is computed otherwise than the chunks before it."""
    model, store, ids = module(tiny()), MemoryStore(), prompt(2 * CHUNK)
    plain = tiny()
    with torch.no_grad(), CakeCache(plain, MemoryStore(), chunk_size=CHUNK) as cache:
        expected = plain(ids, **given(cache), logits_to_keep=1).logits
    for _ in range(2):
        with torch.no_grad(), CakeCache(model, store, chunk_size=CHUNK) as cache:
            assert torch.equal(model(ids, **given(cache), logits_to_keep=1).logits, expected)
            assert cache.report.chunks_computed + cache.report.chunks_loaded == 1
    assert counters["stats"]["unique_graphs"]
    assert len(list(store.keys())) == 1


def test_compiled_code_runs_again_when_the_last_restore_is_over() -> None:
    """It is put aside for all threads at once, and put back by the thread that ends last."""
    model = itself(tiny())
    first, second = as_it_is(model), as_it_is(model)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        model(IDS)
        second.__exit__(None, None, None)
        assert not counters["stats"]["unique_graphs"]
        model(IDS)
        assert counters["stats"]["unique_graphs"]
