"""The call, as users make it: every option of `generate`, a second turn, copies, closing, and what is refused."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

import cake_hf
from cake_hf import CakeCache, CakeError, ForeignModel, MemoryStore, StoreError, UnsupportedModel, reads_only
from cake_hf.cache.generate import _CACHE_OPTIONS
from models import CHUNK, CHUNKS, NEW_TOKENS, build, difference, oracle, prompt, run, run_ahead, shared_model
from naming import cache_of, given
from old_versions import skipped_where_older_versions_fail
from stored import filled_store
from streamed import Collector
from waiting import await_true

QUIET = {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model() -> torch.nn.Module:
    return shared_model("llama")


@pytest.fixture
def store(model: torch.nn.Module) -> MemoryStore:
    """A store with all chunks of the prompt."""
    return filled_store(model)


def both(
    model: torch.nn.Module, store: MemoryStore, ids: torch.Tensor, seed: int = 0, **options: object
) -> list[object]:
    """The same call with a `DynamicCache` on the chunked schedule, and with a `CakeCache`."""
    results = []
    for cache, more in (
        (DynamicCache(config=model.config), {"prefill_chunk_size": CHUNK}),
        (CakeCache(model, store, chunk_size=CHUNK), {}),
    ):
        torch.manual_seed(seed)
        results.append(model.generate(ids, **given(cache), **{**QUIET, **options, **more}))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "max_new_tokens": 12},
        {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 12},
        {"generation_config": GenerationConfig(max_new_tokens=9, do_sample=True, top_p=0.9, eos_token_id=None, pad_token_id=0)},
        {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampling", "generation_config", "penalty"],
)  # fmt: skip
def test_generate_options(model: torch.nn.Module, store: MemoryStore, options: dict[str, object]) -> None:
    expected, restored = both(model, store, prompt(), **options)
    assert torch.equal(expected, restored)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "return_sequences", "prompt_lookup"],
)
def test_other_modes_give_what_dynamic_cache_gives(model: torch.nn.Module, store: MemoryStore, options: dict) -> None:
    """In float32 the tokens are those of plain generate. Equal rows are restored once."""
    torch.manual_seed(0)
    with skipped_where_older_versions_fail():
        expected = model.generate(prompt(), max_new_tokens=10, **QUIET, **options)
    torch.manual_seed(0)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        assert torch.equal(model.generate(prompt(), **given(cache), max_new_tokens=10, **QUIET, **options), expected)
        assert cache.report.chunks_loaded + cache.report.chunks_computed == CHUNKS


def test_streaming(model: torch.nn.Module, store: MemoryStore) -> None:
    streamed = Collector()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        tokens = model.generate(prompt(), **given(cache), streamer=streamed, max_new_tokens=6, do_sample=False, **QUIET)
    assert streamed.tokens == [*tokens[0].tolist(), -1]


def test_attention_mask_of_ones_is_a_plain_prompt(model: torch.nn.Module, store: MemoryStore) -> None:
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        outcome = run(model, prompt(), cache, attention_mask=torch.ones_like(prompt()))
        assert cache.report.reason == ""
    assert difference(outcome, oracle(model, prompt())) == ""


def test_generate_function_returns_what_generate_returns(model: torch.nn.Module, store: MemoryStore) -> None:
    expected = oracle(model, prompt())
    for inputs in ((prompt(),), ()):
        result = cake_hf.generate(
            model, *inputs, store=store, chunk_size=CHUNK, strategy="load", max_new_tokens=NEW_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **QUIET, **({} if inputs else {"input_ids": prompt()}),
        )  # fmt: skip
        assert torch.equal(torch.stack(result.logits), expected.logits)
        assert cache_of(result).report.chunks_loaded == CHUNKS
    plain = cake_hf.generate(model, prompt(), store=store, chunk_size=CHUNK, max_new_tokens=3, do_sample=False, **QUIET)
    assert torch.equal(plain, expected.tokens[:, : plain.shape[1]])


def test_generate_function_serves_models_without_logits_to_keep(
    model: torch.nn.Module, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the hook cannot tell a prompt from a call that wants all logits, so the prefix is restored beforehand."""
    full = type(model).forward

    def forward(
        self: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,  # both of older versions
    ) -> object:
        return full(self, input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    for _ in range(2):  # with a forward of another file its KV has names of its own
        result = cake_hf.generate(
            model, prompt(), store=store, chunk_size=CHUNK, strategy="load", max_new_tokens=8, do_sample=False,
            return_dict_in_generate=True, **QUIET,
        )  # fmt: skip
    assert cache_of(result).report.chunks_loaded == CHUNKS
    monkeypatch.undo()
    assert torch.equal(result.sequences, oracle(model, prompt(), max_new_tokens=8).tokens)


def test_generate_function_takes_all_options_of_a_cache() -> None:
    for_tests = {"rules"}
    options = set(inspect.signature(CakeCache).parameters) - {"model", "store"} - for_tests
    assert set(_CACHE_OPTIONS) == options


@pytest.mark.parametrize("change", ["reset", "crop"])
def test_a_prefill_that_was_undone_is_not_reported(change: str, model: torch.nn.Module, store: MemoryStore) -> None:
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        cache.reset() if change == "reset" else cache.crop(-cache.get_seq_length())
        run(model, prompt(CHUNK - 3, seed=4), cache)
        assert (cache.report.tokens, cache.report.chunks_computed) == (CHUNK - 3, 0)


def test_an_interrupted_forward_does_not_lower_the_guard(model: torch.nn.Module, store: MemoryStore) -> None:
    """Ctrl-C comes past torch's hooks behind a forward. From the next forward of the model on all is as it was."""

    def interrupt(module: torch.nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        handle = model.model.layers[0].register_forward_pre_hook(reads_only(interrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, prompt(CHUNK - 3), cache)
        handle.remove()
        cache.reset()
        run(model, prompt(CHUNK - 3), cache)
        with pytest.raises(ForeignModel), torch.no_grad():
            build("llama", seed=7)(prompt(3), **given(cache))


def test_generate_function_refuses_a_cache(model: torch.nn.Module, store: MemoryStore) -> None:
    with pytest.raises(ValueError, match="makes its own cache"):
        cake_hf.generate(model, prompt(), store=store, **given(DynamicCache()))


@pytest.mark.parametrize("more", [5, CHUNK - 1, CHUNK, 3 * CHUNK + 4])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_second_turn(family: str, more: int) -> None:
    """A cache passed again gives what a `DynamicCache` passed again gives. The first turn's reply is stored, too."""
    model, store = shared_model(family), MemoryStore()
    outcomes = []
    for cache, options in (
        (DynamicCache(config=model.config), {"prefill_chunk_size": CHUNK}),
        (CakeCache(model, store, chunk_size=CHUNK), {}),
    ):
        first = run(model, prompt(), cache, **options)
        longer = torch.cat([first.tokens, prompt(more, seed=9)], dim=1)
        if options:
            run_ahead(model, longer, cache)
        # Said outright, since generate would take a generated token 0 for padding.
        outcomes.append(run(model, longer, cache, attention_mask=torch.ones_like(longer)))
    assert difference(*outcomes) == ""
    assert isinstance(cache, CakeCache)
    assert cache.flush(60)
    assert (
        len(list(store.keys())) == CHUNKS + 2 + (more + 1) // CHUNK
    )  # last piece, decoded tokens, and whole chunks behind them
    cache.close()


def go_on_to(cache: CakeCache, model: torch.nn.Module, ids: torch.Tensor, end: int) -> bool:
    """Run the tokens up to there; returns whether the KV lies by token then, or else by head."""
    with torch.no_grad():
        model(input_ids=ids[:, cache.get_seq_length() : end], **given(cache), logits_to_keep=1)
    return bool(cache.layers[0].keys.transpose(1, 2).is_contiguous())


def test_kv_lies_by_token_while_chunks_land_in_it(model: torch.nn.Module, store: MemoryStore) -> None:
    """While tokens are decoded it lies by head."""
    end = prompt().shape[1]
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        assert go_on_to(cache, model, prompt(), end - 2)
        assert not go_on_to(cache, model, prompt(), end - 1)
        cache.crop(3 * CHUNK - cache.get_seq_length())
        assert go_on_to(cache, model, prompt(), end)
        assert cache.report.chunks_loaded == CHUNKS - 3


@pytest.mark.parametrize("strategy", ["both", "compute"])
def test_kv_that_is_only_computed_lies_by_head_from_the_first(
    strategy: str, model: torch.nn.Module, store: MemoryStore
) -> None:
    """So it is not moved at all: not for the tokens that are decoded, and not for the next turn."""
    ids = torch.cat([prompt(), prompt(CHUNK, seed=9)], dim=1)
    first, second = prompt().shape[1], ids.shape[1] - 2
    store = store if strategy == "compute" else MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
        places = set()
        for end in (first, first + 1, second, second + 1):
            assert not go_on_to(cache, model, ids, end)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


def test_chunks_given_one_by_one_are_on_the_schedule(model: torch.nn.Module) -> None:
    """`prefill_chunk_size` equal to ours: each call brings one full chunk, and each is saved."""
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        outcome = run(model, prompt(), cache, prefill_chunk_size=CHUNK)
    assert len(list(store.keys())) == CHUNKS
    assert difference(outcome, oracle(model, prompt())) == ""
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        assert difference(run(model, prompt(), cache), oracle(model, prompt())) == ""
        assert cache.report.chunks_loaded == CHUNKS


def test_cropped_to_the_end_of_a_chunk_it_goes_on_restoring(model: torch.nn.Module, store: MemoryStore) -> None:
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        run(model, prompt(), cache)
        cache.crop(3 * CHUNK - cache.get_seq_length())
        outcome = run(model, prompt(), cache)
        assert cache.report.chunks_loaded == CHUNKS - 3
    assert difference(outcome, oracle(model, prompt())) == ""


def test_cropped_and_refilled_by_decoding_it_saves_nothing(model: torch.nn.Module, store: MemoryStore) -> None:
    """The same length as before, but tokens that were decoded one by one: off the schedule."""
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        run(model, prompt(), cache)
        cache.crop(3 * CHUNK - 2 - cache.get_seq_length())
        with torch.no_grad():
            for token in prompt()[0, 3 * CHUNK - 2 : 3 * CHUNK]:
                model(token.view(1, 1), **given(cache))
        assert cache.get_seq_length() == 3 * CHUNK
        longer = torch.cat([prompt()[:, : 3 * CHUNK], prompt(2 * CHUNK, seed=5)], dim=1)
        run(model, longer, cache)
        assert cache.report.reason_code == "off-schedule"
    assert len(list(store.keys())) == CHUNKS


def test_deepcopy_shares_the_store_and_nothing_else(model: torch.nn.Module, store: MemoryStore) -> None:
    """Prefill a document once, then ask it several questions, each on a copy."""
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        for seed in (3, 4):
            ids = torch.cat([prompt()[:, : CHUNKS * CHUNK], prompt(9, seed)], dim=1)
            assert difference(run(model, ids, copy.deepcopy(cache)), oracle(model, ids)) == ""
        assert cache.get_seq_length() == CHUNKS * CHUNK


def test_prefill_then_generate(model: torch.nn.Module, store: MemoryStore) -> None:
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        assert cache.prefill(prompt()).chunks_loaded == CHUNKS
        outcome = run(model, prompt(), cache)
        assert cache.report.chunks_loaded == CHUNKS
        assert cache.report.timeline[-1].chunk == -1
    assert difference(outcome, oracle(model, prompt())) == ""


def test_several_caches_on_one_model_in_threads(model: torch.nn.Module, store: MemoryStore) -> None:
    prompts = [prompt(seed=seed) for seed in (1, 2, 3, 1)]
    outcomes: dict[int, str] = {}

    def ask(number: int) -> None:
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            outcomes[number] = difference(run(model, prompts[number], cache), oracle(model, prompts[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert outcomes == dict.fromkeys(range(len(prompts)), "")


def test_under_inference_mode(model: torch.nn.Module, store: MemoryStore) -> None:
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        with torch.inference_mode():
            run(model, prompt(), cache)
        longer = torch.cat([prompt(), prompt(5, seed=8)], dim=1)
        cache.crop(prompt().shape[1] - cache.get_seq_length())
        run(model, longer, cache)


def test_close_is_idempotent_and_takes_the_hook_away() -> None:
    model = build("llama")
    hooks = [module._forward_pre_hooks for module in (model, model.base_model)]
    hooks += [module._forward_hooks for module in (model, model.base_model)]
    one, two = CakeCache(model, MemoryStore()), CakeCache(model, MemoryStore())
    assert all(hooks)
    one.close()
    one.close()
    assert one.closed
    assert all(hooks)
    two.close()
    assert not any(hooks)


def test_the_hook_goes_with_the_last_cache() -> None:
    model = build("llama")
    cache = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
    run(model, prompt(), cache)
    del cache

    def is_gone() -> bool:
        gc.collect()  # a thread that is just ending may have held it
        return not model._forward_pre_hooks

    await_true(is_gone)
    assert not any(thread.name == "cake-writer" and not thread.daemon for thread in threading.enumerate())


def test_a_closed_cache_is_a_plain_cache(model: torch.nn.Module, store: MemoryStore) -> None:
    cache = CakeCache(model, store, chunk_size=CHUNK)
    cache.close()
    single = run(model, prompt(), DynamicCache(config=model.config))
    assert difference(run(model, prompt(), cache), single) == ""
    with pytest.raises(CakeError, match="closed"):
        cache.prefill(prompt())


def test_a_call_that_wants_all_logits_is_left_alone(model: torch.nn.Module, store: MemoryStore) -> None:
    with CakeCache(model, store, chunk_size=CHUNK) as cache, torch.no_grad():
        logits = model(prompt(), **given(cache)).logits
        assert cache.report.reason_code == "all-logits"
        assert torch.equal(logits, model(prompt(), **given(DynamicCache(config=model.config))).logits)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"input_ids": prompt(CHUNK - 1)}, "less than one chunk"),
        ({"input_ids": prompt(), "attention_mask": (prompt() > 3).long()}, "mask"),
        ({"inputs_embeds": torch.ones(1, 40, 64)}, "embeddings"),
    ],
)
def test_a_plainly_computed_prompt_has_a_reason(model: torch.nn.Module, arguments: dict, reason: str) -> None:
    options = {**QUIET, **arguments, "max_new_tokens": 5, "do_sample": False}
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        result = model.generate(**given(cache), **options)
        assert reason in cache.report.reason
        assert reason in str(cache.report)
    assert torch.equal(result, model.generate(**options))


@pytest.mark.fault(
    "Prompt",
    "A mask is shorter than the prompt, or positions are counted from elsewhere.",
    "The prompt is computed as it comes, and nothing of it is stored.",
)
@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"attention_mask": torch.ones(1, 20, dtype=torch.long)}, "mask"),
        ({"cache_position": torch.arange(9, 9 + prompt().shape[1])}, "positions"),
        ({"position_ids": torch.arange(9, 9 + prompt().shape[1])[None]}, "positions"),
    ],
    ids=["mask", "cache_position", "position_ids"],
)
def test_a_mask_or_positions_of_a_callers_own_are_not_stored(how: dict, code: str) -> None:
    model, store = shared_model("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache, torch.no_grad():
        model(prompt(), **given(cache), logits_to_keep=1, **how)
        assert cache.report.reason_code == code
    assert list(store.keys()) == []


def test_a_mask_of_all_tokens_is_plain() -> None:
    """The negative control of the one above."""
    model, store, ids = shared_model("llama"), MemoryStore(), prompt()
    plain = {"attention_mask": torch.ones_like(ids), "cache_position": torch.arange(ids.shape[1])}
    with CakeCache(model, store, chunk_size=CHUNK) as cache, torch.no_grad():
        model(ids, **given(cache), logits_to_keep=1, **plain)
    assert len(list(store.keys())) == CHUNKS


def test_an_empty_store_is_said(model: torch.nn.Module) -> None:
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        run(model, prompt(), cache)
        assert cache.report.reason_code == "none-stored"


def test_training_mode_is_left_alone() -> None:
    model = build("llama").train()
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        run(model, prompt(), cache)
        assert "training mode" in cache.report.reason


def test_an_unknown_layer_kind_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    class SinkLayer(DynamicLayer):  # type: ignore[misc]
        """Registered from elsewhere; what else it keeps is not ours to guess."""

    begin = DynamicCache.__init__

    def begin_with_sinks(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.layers = [SinkLayer() for _ in self.layers]

    monkeypatch.setattr(DynamicCache, "__init__", begin_with_sinks)
    model, store = build("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        result = model.generate(prompt(), **given(cache), max_new_tokens=8, do_sample=False, **QUIET)
        assert "SinkLayer" in cache.report.reason
    assert torch.equal(result, model.generate(prompt(), max_new_tokens=8, do_sample=False, **QUIET))
    assert list(store.keys()) == []


def test_another_models_cache_is_refused(model: torch.nn.Module) -> None:
    other = build("llama", seed=7)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with pytest.raises(ForeignModel, match="make a CakeCache for each model"):
            other.generate(prompt(), **given(cache), max_new_tokens=2, **QUIET)
        with CakeCache(other, MemoryStore()), pytest.raises(ForeignModel):
            other.generate(prompt(), **given(cache), max_new_tokens=2, **QUIET)
        assert difference(run(model, prompt(), cache), oracle(model, prompt())) == ""


def test_the_decoder_alone_may_use_the_cache(model: torch.nn.Module) -> None:
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, torch.no_grad():
        model.model(prompt(), **given(cache))
        assert cache.get_seq_length() == prompt().shape[1]


def test_models_that_are_refused() -> None:
    with torch.device("meta"):
        empty = build("llama")
    with pytest.raises(UnsupportedModel, match="load the weights"):
        CakeCache(empty, MemoryStore())
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=32))
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        CakeCache(t5, MemoryStore())

    class Bare(torch.nn.Module):
        config = shared_model("llama").config

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(UnsupportedModel, match="takes no cache"):
        CakeCache(Bare(), MemoryStore())


def test_settings_that_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        CakeCache(model, MemoryStore(), chunk_size=15)
    with pytest.raises(ValueError, match="choose one of both, compute, load"):
        CakeCache(model, MemoryStore(), strategy="sideways")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="give the path of a directory"):
        CakeCache(model, tmp_path / "file")
    with pytest.raises(StoreError, match="known are"):
        CakeCache(model, "ftp://somewhere/else")


def test_a_read_only_store_serves_and_nothing_is_saved(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CakeCache(model, tmp_path, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
    (new := tmp_path / "new").mkdir()
    real_open = __import__("os").open

    def read_only(path: str, flags: int, *rest: int, **options: int) -> int:
        import errno
        import os

        below = options or str(path).startswith(str(tmp_path))
        if below and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "read-only", str(path))
        return int(real_open(path, flags, *rest, **options))

    monkeypatch.setattr("os.open", read_only)
    for save in (True, False):
        with CakeCache(model, tmp_path, chunk_size=CHUNK, save=save, strategy="load") as cache:
            assert difference(run(model, prompt(), cache), oracle(model, prompt())) == ""
            assert cache.report.chunks_loaded == CHUNKS
    with pytest.raises(StoreError, match="save=False"):
        CakeCache(model, new, chunk_size=CHUNK)
