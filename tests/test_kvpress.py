"""kvpress's presses on a restored prompt: the tokens are those on a computed one, cold and warm, and what is saved is plain KV.

kvpress needs an older transformers than most environments have: `make test-kvpress` makes one with both.
"""

from __future__ import annotations

import copy
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeCache, CakeError, MemoryStore, reads_only
from cake_hf.model import foreign_code as served
from cake_hf.presses import FromKvpress, ThinK
from models import CHUNK, CHUNKS, TAIL, build, difference, expected, oracle, prompt, run, run_ahead
from naming import given

if find_spec("kvpress") is None and not os.environ.get("CAKE_HF_REQUIRE_KVPRESS"):
    pytest.skip("kvpress is not installed; make test-kvpress runs these", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the standard library, about what kvpress imports
    import kvpress

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILY = ["llama", "qwen3"]


def make(name: str, ratio: float = 0.5) -> Any:
    return getattr(kvpress, name)(compression_ratio=ratio)


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def pressed_by_hand(model: Any, press: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The reference: chunked prefill on a `DynamicCache`, then the press on all that it holds. The last logits, and the KV."""
    cache = DynamicCache(config=model.config)
    run_ahead(model, ids, cache)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        logits = model(ids[:, cache.get_seq_length() :], attention_mask=mask, **given(cache), logits_to_keep=1).logits
        for module, layer in zip((one.self_attn for one in model.model.layers), cache.layers, strict=True):
            layer.keys, layer.values = press.compress(module, None, layer.keys, layer.values, None, {})
    return logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("name", sorted(served.SERVED))
def test_a_press_on_a_restored_prompt(name: str, family: str) -> None:
    """Cold, warm, and met in the middle: the tokens of the press on a `DynamicCache`, and bit for bit the same KV."""
    model: Any = build(family)
    press, store = make(name), MemoryStore()
    with press(model):
        plain = model.generate(prompt(), **given(DynamicCache(config=model.config)), **OPTIONS)
    logits, kept = pressed_by_hand(model, press, prompt())
    for strategy in ("load", "load", "both"):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache, press(model):
            assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain)
            assert cache.flush(60)
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache, press(model), torch.no_grad():
            found = model(prompt(), **given(cache), logits_to_keep=1).logits
            assert torch.equal(found, logits)
            assert cache.get_seq_length() < prompt().shape[1]
            held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            assert all(torch.equal(one, other) for one, other in zip(held, kept, strict=True))
    assert cache.report.chunks_loaded + cache.report.chunks_computed == CHUNKS
    assert hooks_on(model) == 0


def test_a_press_that_does_nothing_would_be_seen() -> None:
    """The negative control: without the press the tokens, and the KV, are others."""
    model: Any = build("llama")
    press = make("KnormPress")
    with press(model):
        plain = model.generate(prompt(), **given(DynamicCache(config=model.config)), **OPTIONS)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert not torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain)


def test_what_is_saved_under_a_press_is_the_models_own() -> None:
    model: Any = build("llama")
    ids, store = prompt(CHUNK * CHUNKS), MemoryStore()  # its last piece is a full chunk, and saved, too
    with CakeCache(model, store, chunk_size=CHUNK) as cache, make("KeyDiffPress")(model):
        model.generate(ids, **given(cache), **OPTIONS)
        assert cache.flush(60)
        assert cache.report.chunks_saved == CHUNKS
    whole = torch.cat([ids, prompt()[:, -TAIL:]], dim=1)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        found = run(model, whole, cache)
        assert cache.report.chunks_loaded == CHUNKS
    assert difference(found, oracle(model, whole)) == ""


def test_a_prompt_of_one_chunk_is_pressed_once() -> None:
    model: Any = build("llama")
    press = make("KnormPress")
    for tokens in (CHUNK - 1, CHUNK, CHUNK + 1):
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, press(model), torch.no_grad():
            model(prompt(tokens), **given(cache), logits_to_keep=1)
            used = DynamicCache(config=model.config)
            model(prompt(tokens), **given(used), logits_to_keep=1)
            assert cache.get_seq_length() == used.get_seq_length(), tokens


def test_beams_and_a_second_turn() -> None:
    model: Any = build("llama")
    press, store = make("StreamingLLMPress"), MemoryStore()
    with press(model):
        plain = model.generate(prompt(), num_beams=2, **OPTIONS)
        for _ in range(2):
            with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
                assert torch.equal(model.generate(prompt(), num_beams=2, **given(cache), **OPTIONS), plain)
                assert cache.flush(60)
    outputs = []
    for used in (DynamicCache(config=model.config), CakeCache(model, store, chunk_size=CHUNK)):
        with press(model), torch.no_grad():
            model(prompt(), **given(used), logits_to_keep=1)
        with torch.no_grad():
            positions = torch.arange(prompt().shape[1], prompt().shape[1] + 9)[None]
            outputs.append(
                model(prompt(9, seed=6), **given(used), position_ids=positions, logits_to_keep=1).logits.argmax(-1)
            )
    assert torch.equal(*outputs)
    used.close()


@pytest.mark.parametrize("chunks", [CHUNKS, 3])
@pytest.mark.parametrize("copied", [False, True])
def test_prefill_under_a_press(chunks: int, copied: bool) -> None:
    """What `prefill` brings is pressed with the rest of the prompt, once the model runs that, however long it is."""
    model: Any = build("llama")
    press = make("KnormPress")
    with press(model):
        plain = model.generate(prompt(), **given(DynamicCache(config=model.config)), **OPTIONS)
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            cache.prefill(prompt()[:, : chunks * CHUNK + 1])
            assert cache.get_seq_length() == chunks * CHUNK
            used = copy.deepcopy(cache) if copied else cache
            assert torch.equal(model.generate(prompt(), **given(used), **OPTIONS), plain)


def test_a_press_that_needs_more_is_computed_plainly() -> None:
    model: Any = build("llama")
    press = kvpress.SnapKVPress(compression_ratio=0.5, window_size=8)
    store = MemoryStore()
    with press(model):
        plain = model.generate(prompt(), **given(DynamicCache(config=model.config)), **OPTIONS)
        for _ in range(2):
            with CakeCache(model, store, chunk_size=CHUNK) as cache:
                assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain)
                assert "SnapKVPress looks at more than the KV" in cache.report.reason
                assert cache.flush(60)
    assert list(store.keys()) == []


def test_an_error_in_the_last_piece_leaves_the_press_at_work() -> None:
    model: Any = build("llama")
    press = make("KnormPress")

    def fail(*_: object) -> None:
        raise TimeoutError("mine")

    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, press(model):
        handle = model.lm_head.register_forward_pre_hook(
            reads_only(lambda _, args: fail() if args[0].shape[1] == 1 else None)
        )
        hooks = hooks_on(model)
        with pytest.raises(TimeoutError, match="mine"):
            model.generate(prompt(), **given(cache), **OPTIONS)
        handle.remove()
        assert hooks_on(model) == hooks
        plain = model.generate(prompt(), **given(DynamicCache(config=model.config)), **OPTIONS)
        assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain)
    assert hooks_on(model) == 0


def test_after_ctrl_c_the_press_is_at_work() -> None:
    """In the last piece, where torch calls no hooks any more: on other caches at once, and on the same one."""
    model: Any = build("llama")

    def interrupt(module: Any, args: Any) -> None:
        if args[0].shape[1] == 1:
            raise KeyboardInterrupt

    with make("KnormPress")(model):
        plain = DynamicCache(config=model.config)
        tokens = model.generate(prompt(), **given(plain), **OPTIONS)
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            handle = model.lm_head.register_forward_pre_hook(reads_only(interrupt))
            with pytest.raises(KeyboardInterrupt):
                model.generate(prompt(), **given(cache), **OPTIONS)
            handle.remove()
            for used in (DynamicCache(config=model.config), CakeCache(model, cache.store, chunk_size=CHUNK), cache):
                assert torch.equal(model.generate(prompt(), **given(used), **OPTIONS), tokens)
                assert used.get_seq_length() == plain.get_seq_length()


def test_caches_in_several_threads_are_pressed_each() -> None:
    """While one of them has its press rest, the others' are at work."""
    model: Any = build("llama")
    store, lengths = MemoryStore(), []
    with make("KnormPress")(model):
        plain = DynamicCache(config=model.config)
        model.generate(prompt(), **given(plain), **OPTIONS)

        def ask(number: int) -> None:
            used: Any = DynamicCache(config=model.config)
            if number % 2:
                used = CakeCache(model, store, chunk_size=CHUNK)
            model.generate(prompt(), **given(used), **OPTIONS)
            lengths.append(used.get_seq_length())

        with ThreadPoolExecutor(3) as threads:
            list(threads.map(ask, range(24)))
    assert set(lengths) == {plain.get_seq_length()}


class MyPress(kvpress.KnormPress):  # type: ignore[misc]
    """A user's own."""


def test_a_press_of_ones_own_is_computed_plainly() -> None:
    model: Any = build("llama")
    press, store = MyPress(compression_ratio=0.5), MemoryStore()
    with press(model):
        plain = model.generate(prompt(), **given(DynamicCache(config=model.config)), **OPTIONS)
        for _ in range(2):
            with CakeCache(model, store, chunk_size=CHUNK) as cache:
                assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain)
                assert "MyPress looks at more" in cache.report.reason


def test_without_a_press_nothing_is_different() -> None:
    """kvpress patches the attention functions at import; the bits are the oracle's all the same."""
    model: Any = build("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert difference(run(model, prompt(), cache), expected()) == ""


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("name", ["KeyDiffPress", "KnormPress", "LagKVPress", "SnapKVPress", "StreamingLLMPress"])
def test_presses_run_through_our_interface(name: str, family: str) -> None:
    """`FromKvpress` on a restored prompt keeps what the press keeps of a computed one, and leaves the restored cache alone."""
    model: Any = build(family)
    press = make(name)
    with torch.no_grad(), press(model):
        computed = DynamicCache(config=model.config)
        model(prompt(), attention_mask=torch.ones_like(prompt()), **given(computed))
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        small = FromKvpress(press)(model, cache)
        assert FromKvpress(press)(model, cache).report.entries == small.report.entries
    assert small.get_seq_length() == prompt().shape[1]
    for layer, other in zip(small.layers, computed.layers, strict=True):
        assert torch.allclose(layer.keys, other.keys, atol=1e-5)
        assert torch.allclose(layer.values, other.values, atol=1e-5)
    assert small.report.bytes_after < small.report.bytes_before
    model.generate(torch.cat([prompt(), prompt(5, seed=5)], dim=1), **given(small), **OPTIONS)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_our_think_drops_the_channels_that_kvpress_zeroes(ratio: float, family: str) -> None:
    model: Any = build(family)
    cache = DynamicCache(config=model.config)
    run_ahead(model, prompt(), cache)
    ids = prompt()[:, : cache.get_seq_length()]
    theirs = FromKvpress(kvpress.ThinKPress(key_channel_compression_ratio=ratio))(model, cache, ids)
    ours = ThinK(ratio)(model, cache, ids)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        kept = (other.keys != 0).any(dim=-2)
        assert torch.equal(kept.nonzero()[:, 2].view_as(one.kept), one.kept)


def test_presses_that_need_more_are_refused_by_our_interface() -> None:
    with pytest.raises(CakeError, match="ExpectedAttentionPress may look at more"):
        FromKvpress(make("ExpectedAttentionPress"))
