"""Going on with another cache: what was restored is handed over, and gives what that cache gives by itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import DynamicLayer

from cake_hf import CakeCache, CakeError, MemoryStore
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run, shared_model
from naming import NAME, given
from stored import filled_store

OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def restored(*dtype: str) -> CakeCache:
    """A cache with all full chunks of the prompt, loaded where the dtype is that of the store."""
    store = filled_store(shared_model("llama"))
    used = CakeCache(shared_model("llama", *dtype), store, chunk_size=CHUNK, strategy="load", save=False)
    used.prefill(prompt())
    return used


def chunked_prefix(model: torch.nn.Module) -> DynamicCache:
    """What the oracle has after the prompt's full chunks."""
    used = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in prompt()[:, : CHUNKS * CHUNK].split(CHUNK, dim=1):
            model(piece, **given(used))
    return used


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_to_dynamic_cache(dtype: str) -> None:
    """Bit for bit the oracle's, of transformers' own types, and from then on independent."""
    model = shared_model("llama", dtype)
    with restored(dtype) as used:
        dynamic = used.to_dynamic_cache()
        assert type(dynamic) is DynamicCache
        assert all(type(layer) is DynamicLayer for layer in dynamic.layers)
        assert difference(run(model, prompt(), dynamic), oracle(model, prompt())) == ""
        assert used.get_seq_length() == CHUNKS * CHUNK
        used.layers[0].keys.zero_()
        assert dynamic.layers[0].keys[:, :, : CHUNKS * CHUNK].any()


def test_to_dynamic_cache_at_any_time() -> None:
    """Before anything came, in the midst of a conversation, and after closing."""
    model = shared_model("llama")
    used = CakeCache(model, filled_store(model), chunk_size=CHUNK, save=False)
    assert (
        difference(run(model, prompt(), used.to_dynamic_cache(), prefill_chunk_size=CHUNK), oracle(model, prompt()))
        == ""
    )
    first = run(model, prompt(), used)
    used.close()
    longer = torch.cat([first.tokens, prompt(9, seed=4)], dim=1)
    mask = {"attention_mask": torch.ones_like(longer)}
    dynamic = used.to_dynamic_cache()
    assert difference(run(model, longer, dynamic, **mask), run(model, longer, used, **mask)) == ""


def test_to_static_cache_gives_the_same_tokens() -> None:
    model = shared_model("llama")
    with restored() as used:
        static = used.to_static_cache(max_cache_len=CHUNKS * CHUNK + 40)
    assert type(static) is StaticCache
    assert int(static.get_seq_length()) == CHUNKS * CHUNK
    for layer, plain in zip(static.layers, chunked_prefix(model).layers, strict=True):
        assert torch.equal(layer.keys[:, :, : CHUNKS * CHUNK], plain.keys)
        assert torch.equal(layer.values[:, :, : CHUNKS * CHUNK], plain.values)
    assert torch.equal(model.generate(prompt(), **given(static), **OPTIONS), model.generate(prompt(), **OPTIONS))


def test_a_static_cache_is_filled_again() -> None:
    """Shorter after longer: nothing of the first prompt is left, and no tensor has moved."""
    model, other = shared_model("llama"), prompt(50, seed=8)
    with restored() as used:
        static = used.to_static_cache(max_cache_len=CHUNKS * CHUNK + 40)
        places = [layer.keys.data_ptr() for layer in static.layers]
        model.generate(prompt(), **given(static), **OPTIONS)
        used.reset()
        used.prefill(other)
        assert used.to_static_cache(into=static) is static
        assert [layer.keys.data_ptr() for layer in static.layers] == places
        assert torch.equal(model.generate(other, **given(static), **OPTIONS), model.generate(other, **OPTIONS))
        used.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="made for 1"):
            used.to_static_cache(into=static)


def test_no_room_in_the_static_cache() -> None:
    with restored() as used, pytest.raises(ValueError, match="larger max_cache_len"):
        used.to_static_cache(max_cache_len=CHUNKS * CHUNK)


def test_compiled_decoding_is_compiled_once_for_all_prompts() -> None:
    """By the tracing half of torch.compile, which is where it is decided what has to be compiled anew."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, store, static = LlamaForCausalLM(config).eval(), MemoryStore(), None
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True  # generate does it by itself on a GPU only
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, tokens in ((1, 90), (2, 71), (1, 90), (3, 40)):
            ids = prompt(tokens, seed)
            with CakeCache(model, store, chunk_size=CHUNK) as used:
                used.prefill(ids)
                static = used.to_static_cache(128, into=static)
            found = model.generate(ids, **given(static), compile_config=compiled, **OPTIONS)
            assert torch.equal(found, model.generate(ids, **OPTIONS))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


BACKENDS = {"fp8": "", "quanto": "optimum.quanto", "hqq": "hqq"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_to_quantized_cache(backend: str) -> None:
    """What it gives is what a `QuantizedCache` gives that was handed the oracle's KV."""
    package = BACKENDS[backend].split(".")[0]
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if not package and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no backend of its own")
    model = shared_model("llama")
    with restored() as used:
        quantized = used.to_quantized_cache(backend)
        assert type(quantized) is QuantizedCache
    expected = QuantizedCache(backend, model.config)
    for number, layer in enumerate(chunked_prefix(model).layers):
        expected.update(layer.keys, layer.values, number)
    found = model.generate(prompt(), **given(quantized), **OPTIONS)
    assert torch.equal(found, model.generate(prompt(), **given(expected), **OPTIONS))


# kvpress 0.5.5 asks for transformers below 5.3, and its hooks for an argument that models are no longer given. So what its
# presses do is written out here.


def press(layer: Any, kept: int) -> None:
    """Fewer tokens, by some score."""
    best = layer.keys.norm(dim=-1).argsort(dim=-1)[..., :kept, None].expand(-1, -1, -1, layer.keys.shape[-1])
    layer.keys, layer.values = layer.keys.gather(2, best), layer.values.gather(2, best)


@contextmanager
def pressing(model: Any, kept: int) -> Iterator[None]:
    """A press at work: a hook on each attention, which shortens what the cache's layer holds once the attention is through."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        press(kwargs[NAME].layers[module.layer_idx], kept)

    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_a_pressed_cache_goes_on() -> None:
    """Both ways: in a cache that is handed over, and in the restored one itself."""
    model, results = shared_model("llama"), []
    with restored() as used:
        for pressed in (chunked_prefix(model), used.to_dynamic_cache(), used):
            for layer in pressed.layers:
                press(layer, 60)
            with torch.no_grad():
                results.append(model(prompt(9, seed=6), **given(pressed)).logits)
            assert pressed.get_seq_length() == 69
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_press_works_in_a_forward_behind_a_restored_prompt() -> None:
    model, results = shared_model("llama"), []
    with restored() as used, torch.no_grad():
        for pressed in (chunked_prefix(model), used.to_dynamic_cache(), used):
            with pressing(model, 50):
                model(prompt(9, seed=6), **given(pressed))
            assert pressed.get_seq_length() == 50
            results.append([model(prompt(1, seed=seed), **given(pressed)).logits for seed in range(3)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_a_press_of_a_users_own_is_a_plain_one() -> None:
    """The chunks behind it would not be those of the prompt; nothing of it is stored."""
    model, store = shared_model("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as used:
        with pressing(model, 10):
            answer = model.generate(prompt(), **given(used), **OPTIONS)
            assert torch.equal(model.generate(prompt(), **given(DynamicCache()), **OPTIONS), answer)
        assert "a forward hook on model.layers.0.self_attn" in used.report.reason
        used.reset()
        assert used.flush(60)
        assert list(store.keys()) == []
        assert difference(run(model, prompt(), used), oracle(model, prompt())) == ""


def test_windows_are_handed_over_as_they_are() -> None:
    """Layers that are no chunks of full attention: to a `DynamicCache` only."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=24,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used:
        first = model.generate(prompt(), **given(used), **OPTIONS)
        with pytest.raises(CakeError, match="to_dynamic_cache"):
            used.to_static_cache(max_cache_len=400)
        with pytest.raises(CakeError, match="to_dynamic_cache"):
            used.to_quantized_cache("fp8")
        found = model.generate(first, **given(used.to_dynamic_cache()), **OPTIONS)
        assert torch.equal(found, model.generate(first, **given(used), **OPTIONS))


def test_a_handed_over_cache_knows_no_model() -> None:
    """Another model may use it, as with any `DynamicCache`; the `CakeCache` itself refuses."""
    other = build("llama", seed=9)
    with restored() as used, torch.no_grad():
        other(prompt(5), **given(used.to_dynamic_cache()))
