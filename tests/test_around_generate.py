"""What `generate` does with a cache, and without: other prompts in it, `use_cache`, several answers, other kinds of caches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import cake_hf
from cake_hf import CakeCache, CakeError, MemoryStore
from families import family_model, here
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run, run_ahead, shared_model
from naming import given
from old_versions import OLD
from stored import filled_store

pytestmark = pytest.mark.skipif(OLD, reason="older versions of transformers cut prompts in other ways")

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LENGTH = prompt().shape[1]
"""Of the first prompt; `generate` leaves five tokens more in the cache, since the last one has not been run."""
KINDS = here("llama", "gemma3", "qwen3_next", "bloom")
"""Full attention, windows, recurrent states, and a model that takes no positions."""


def used_once(model: Any) -> CakeCache:
    cache = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
    model.generate(prompt(), **given(cache), **OPTIONS)
    return cache


def longer(ids: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.cat([ids, prompt(tokens, seed=8)], dim=1)


OTHERS: dict[str, Callable[[], torch.Tensor]] = {
    "longer": lambda: prompt(2 * LENGTH, seed=9),
    "longer by one token": lambda: prompt(LENGTH + 6, seed=9),
    "as long": lambda: prompt(seed=9),
    "as long as what is held": lambda: prompt(LENGTH + 5, seed=9),
    "shorter": lambda: prompt(CHUNK + 3, seed=9),
    "another beginning": lambda: torch.cat([prompt(1, seed=9), longer(prompt(), 30)[:, 1:]], dim=1),
    "another last token": lambda: torch.cat([prompt()[:, :-1], prompt(30, seed=9)], dim=1),
}


@pytest.mark.fault(
    "Prompt",
    "A cache that holds one prompt is given another one.",
    "An error says so; `generate` would cut the prompt by the length of what is there.",
)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("family", KINDS)
def test_another_prompt_is_an_error(family: str, other: str) -> None:
    model = family_model(family)
    with used_once(model) as cache:
        held = cache.get_seq_length()
        with pytest.raises(CakeError, match=f"holds {held} tokens of another prompt; make a new"):
            model.generate(OTHERS[other](), **given(cache), **OPTIONS)
        with pytest.raises(CakeError, match=f"holds {held} tokens of another prompt; make a new"):
            cache.prefill(OTHERS[other]())
        assert cache.get_seq_length() == held


def test_another_batch_is_an_error() -> None:
    model, rows = shared_model("llama"), torch.cat([prompt(70, seed=2), prompt(70, seed=3)])
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        model.generate(rows, **given(cache), **OPTIONS)
        with pytest.raises(CakeError, match="of another prompt"):
            model.generate(torch.cat([rows, rows], dim=1).flip(0), **given(cache), **OPTIONS)


def test_the_same_prompt_again_is_an_error() -> None:
    model = shared_model("llama")
    with used_once(model) as cache, pytest.raises(CakeError, match=f"the prompt has only {LENGTH}; make a new"):
        model.generate(prompt(), **given(cache), **OPTIONS)


@pytest.mark.parametrize("way", ["prefill", "forward", "cropped", "copied"])
def test_a_prompt_that_begins_like_it_goes_on(way: str) -> None:
    model, ids = shared_model("llama"), longer(prompt(), 20)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        if way == "forward":
            with torch.no_grad():
                model(prompt(), **given(cache))
        else:
            cache.prefill(prompt())
        used: Any = copy.deepcopy(cache) if way == "copied" else cache
        if way == "cropped":
            used.crop(-2 * CHUNK)
            ids = torch.cat([ids[:, : (CHUNKS - 2) * CHUNK], prompt(50, seed=7)], dim=1)
        found = model.generate(ids, **given(used), **OPTIONS)
        assert torch.equal(found, model.generate(ids, **OPTIONS))


def test_only_what_is_new_may_be_given() -> None:
    """With a mask for all, as transformers has it: then it is not known what the prompt was before, and nothing is refused."""
    model, new = shared_model("llama"), prompt(20, seed=8)
    found = []
    for cache in (used_once(model), DynamicCache(config=model.config)):
        if not isinstance(cache, CakeCache):
            model.generate(prompt(), **given(cache), **OPTIONS)
        mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
        found.append(model.generate(new, attention_mask=mask, **given(cache), **OPTIONS))
    assert torch.equal(*found)


def test_a_conversation_goes_on_when_its_answers_are_spelled_otherwise() -> None:
    """Tokens that were decoded are not compared: a text that is tokenized again may have others."""
    model = shared_model("llama")
    with used_once(model) as cache:
        ids = longer(prompt(), 40)  # from the sixth token on it goes on where the cache ends
        assert model.generate(ids, **given(cache), **OPTIONS).shape[1] == ids.shape[1] + 6


# `use_cache`


@pytest.mark.fault(
    "Model",
    "A checkpoint, or the caller, says use_cache=False.",
    "The cache is used as with True, and the tokens are those of a plain `generate`.",
)
@pytest.mark.parametrize("where", ["config", "generation_config", "argument"])
@pytest.mark.parametrize("family", KINDS)
def test_use_cache_false(family: str, where: str) -> None:
    model: Any = copy.deepcopy(family_model(family))
    options = {**OPTIONS, **({"use_cache": False} if where == "argument" else {})}
    if where != "argument":
        getattr(model, where).use_cache = False
    expected = model.generate(prompt(), **options)
    store = MemoryStore()
    assert torch.equal(cake_hf.generate(model, prompt(), store=store, chunk_size=CHUNK, **options), expected)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        assert torch.equal(model.generate(prompt(), **given(cache), **options), expected)
        if family != "bloom":  # its prompts cannot be told from calls that want all logits
            assert cache.report.chunks_computed + cache.report.chunks_loaded == CHUNKS
        assert cache.get_seq_length() == LENGTH + 5


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=["beams", "two"]
)
def test_use_cache_false_in_other_modes(mode: dict[str, Any]) -> None:
    model, options = shared_model("llama"), {**OPTIONS, **mode, "use_cache": False}
    torch.manual_seed(0)
    expected = model.generate(prompt(), **options)
    torch.manual_seed(0)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert torch.equal(model.generate(prompt(), **given(cache), **options), expected)


def test_a_padded_batch_without_use_cache() -> None:
    model = shared_model("llama")
    rows = torch.cat([torch.cat([torch.zeros(1, 20, dtype=torch.long), prompt(60)], dim=1), prompt(80, seed=4)])
    options = {**OPTIONS, "attention_mask": (rows != 0).long(), "use_cache": False}
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        found = model.generate(rows, **given(cache), **options)
    assert torch.equal(found, model.generate(rows, **options))


# Several answers to one prompt


@pytest.mark.parametrize(
    "mode",
    [
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
    ids=["sequences", "beams", "returned beams"],
)
@pytest.mark.parametrize("rest", [1, 7, CHUNK])
@pytest.mark.parametrize("family", here("llama", "gemma3", "falcon_h1"))
def test_several_answers_behind_a_prefill(family: str, rest: int, mode: dict[str, Any]) -> None:
    assert_as_plain_behind_a_prefill(family_model(family), prompt(CHUNKS * CHUNK + rest), mode)


@pytest.mark.parametrize("rest", [1, 7, CHUNK])
@pytest.mark.parametrize(
    "mode", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}], ids=["lookup", "assistant"]
)
def test_assisted_decoding_behind_a_prefill(mode: dict[str, Any], rest: int) -> None:
    """transformers gives the whole prompt to the first step, whatever the cache holds."""
    mode = {name: build("qwen2", seed=3) if value is None else value for name, value in mode.items()}
    assert_as_plain_behind_a_prefill(shared_model("llama"), prompt(CHUNKS * CHUNK + rest), mode)


def assert_as_plain_behind_a_prefill(model: Any, ids: torch.Tensor, mode: dict[str, Any]) -> None:
    torch.manual_seed(0)
    expected = model.generate(ids, **{**OPTIONS, **mode})
    torch.manual_seed(0)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(ids)
        assert torch.equal(model.generate(ids, **given(cache), **{**OPTIONS, **mode}), expected)
        assert cache.report.chunks_computed == CHUNKS


def test_several_questions_behind_one_document() -> None:
    model, document = shared_model("llama"), prompt(CHUNKS * CHUNK)
    ids = torch.cat([torch.cat([document, prompt(9, seed=seed)], dim=1) for seed in (3, 4, 5)])
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(document, whole=True)
        assert torch.equal(model.generate(ids, **given(cache), **OPTIONS), model.generate(ids, **OPTIONS))


# Caches of another kind, and calls that leave the cache out


@pytest.mark.parametrize("kind", ["static", "dynamic", "quantized", "offloaded"])
@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_a_kind_of_cache_is_chosen_besides(kind: str, where: str) -> None:
    model, options = build("llama"), dict(OPTIONS)
    if where == "argument":
        options["cache_implementation"] = kind
    else:
        model.generation_config.cache_implementation = kind
    with pytest.raises(ValueError, match=r"cache_implementation=.* asks for another; set it to None"):
        cake_hf.generate(model, prompt(), store=MemoryStore(), **options)
    with CakeCache(model, MemoryStore()) as cache, pytest.raises(ValueError, match="use only one of the two"):
        model.generate(prompt(), **given(cache), **options)  # transformers' own sentence


def test_the_kind_of_cache_that_old_checkpoints_name_is_the_default() -> None:
    model = build("llama")
    model.generation_config.cache_implementation = "hybrid"
    found = cake_hf.generate(model, prompt(), store=MemoryStore(), chunk_size=CHUNK, **OPTIONS)
    assert torch.equal(found, oracle(model, prompt(), max_new_tokens=6).tokens)


def without_a_cache(model: Any, input_ids: torch.Tensor, **ignored: Any) -> torch.Tensor:
    return torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], dim=1)


def with_another_cache(model: Any, input_ids: torch.Tensor, **ignored: Any) -> torch.Tensor:
    other = StaticCache(config=model.config, max_cache_len=200)
    return model.generate(input_ids, **given(other), **OPTIONS)


def not_at_all(model: Any, input_ids: torch.Tensor, **ignored: Any) -> torch.Tensor:
    return input_ids


@pytest.mark.fault(
    "Prompt",
    "A way of generating does not use the cache that it is given.",
    "The report says so; it never is without a reason and without a chunk.",
)
@pytest.mark.parametrize("way", [without_a_cache, with_another_cache, not_at_all])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_cache_that_is_left_out(way: Any, used_before: bool) -> None:
    model = shared_model("llama")
    with CakeCache(model, filled_store(model), chunk_size=CHUNK) as cache:
        if used_before:
            run(model, prompt(), cache)
        model.generate(prompt(50, seed=4), **given(cache), custom_generate=way, **OPTIONS)
        if way is not not_at_all:
            assert cache.report.reason_code == "cache-not-used"
            assert cache.report.chunks_loaded == 0
        elif not used_before:
            assert cache.report.reason_code == "no-prompt-yet"


def test_a_model_that_is_tried_out_within_generate_is_no_cache_left_out() -> None:
    """Under autocast the layout of its KV is found out anew, by a short forward without the cache."""
    model = build("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(prompt(40))
        with torch.autocast("cpu", torch.bfloat16):
            model.generate(prompt(50), **given(cache), **OPTIONS)
        assert cache.report.reason_code == "none-stored"


def test_what_a_logits_processor_asks_the_model_is_no_cache_left_out() -> None:
    """Guidance runs another prompt beside the one in the cache."""
    model = shared_model("llama")
    guided = {"guidance_scale": 1.5, "negative_prompt_ids": prompt(40, seed=9), **OPTIONS}
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy="load") as cache:
        found = model.generate(prompt(), **given(cache), **guided)
        assert (cache.report.reason, cache.report.chunks_loaded) == ("", CHUNKS)
    assert torch.equal(found, model.generate(prompt(), **given(DynamicCache(config=model.config)), **guided))


def test_an_assistant_has_a_cache_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Also where it is the first layers of the same model."""
    model, store = shared_model("llama"), MemoryStore()
    for assistant in ({"assistant_early_exit": 1}, {"assistant_model": build("qwen2", seed=3)}):
        with caplog.at_level(logging.DEBUG, "cake_hf"), CakeCache(model, store, chunk_size=CHUNK) as cache:
            found = model.generate(prompt(), **given(cache), **assistant, **OPTIONS)
            assert cache.report.chunks_computed + cache.report.chunks_loaded == CHUNKS
        assert torch.equal(found, model.generate(prompt(), **OPTIONS))
    assert not [record for record in caplog.records if "without the cache" in record.getMessage()]


def test_trying_a_model_out_is_no_prompt_without_its_cache() -> None:
    """The first prompt of a model also runs some small forwards of the package."""
    model: Any = build("llama", seed=5)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        model.generate(prompt(), **given(cache), **OPTIONS)
        assert cache.report.reason_code == "none-stored"


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK])
def test_no_report_is_blank(tokens: int, ahead: bool) -> None:
    """Cold and warm, whether all is brought by `prefill`, or by chunks of the caller's, or at once."""
    model, store = shared_model("llama"), MemoryStore()
    for pieces in ({}, {}, {"prefill_chunk_size": CHUNK}):
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            if ahead:
                report = cache.prefill(prompt(tokens))
                assert report.reason or report.restored or report.tails_computed or report.tails_loaded
            run(model, prompt(tokens), cache, **pieces)
            report = cache.report
            assert report.reason or report.restored or report.tails_computed or report.tails_loaded
            assert report.tokens == tokens or pieces


# What is said


def left_alone(cache: CakeCache, model: Any) -> dict[str, Callable[[], Any]]:
    return {
        "wants the logits of all tokens; call cache.prefill": lambda: model(prompt(), **given(cache)),
        "less than one chunk": lambda: model.generate(prompt(CHUNK - 1), **given(cache), **OPTIONS),
        "hidden states, or attentions": lambda: model(
            prompt(), **given(cache), logits_to_keep=1, output_hidden_states=True
        ),
        "given as embeddings": lambda: model.generate(inputs_embeds=torch.ones(1, 40, 64), **given(cache), **OPTIONS),
    }


def test_what_is_left_alone_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake_hf.restore.support._told", set())
    model = shared_model("llama")
    with caplog.at_level(logging.INFO, "cake_hf"), torch.no_grad():
        for _ in range(2):
            for reason in ("logits", "chunk", "states", "embeddings"):
                with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
                    said, call = next(one for one in left_alone(cache, model).items() if reason in one[0])
                    call()
                    assert said in cache.report.reason
    messages = [record.getMessage() for record in caplog.records if record.name == "cake_hf"]
    assert [sum(said in message for message in messages) for said in left_alone(cache, model)] == [1] * 4
    assert all(record.levelno == logging.INFO for record in caplog.records if record.name == "cake_hf")


def test_the_recipe_of_transformers_says_what_to_call() -> None:
    """A prefix by a forward for all logits, then a copy per question: right, not stored, and it says how to have that."""
    model, store = shared_model("llama"), MemoryStore()
    prefix = prompt(CHUNKS * CHUNK)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        with torch.no_grad():
            model(prefix, **given(cache))
        assert "cache.prefill(ids)" in cache.report.reason
        assert "logits_to_keep=1" in cache.report.reason
        for seed in (3, 4):
            ids = torch.cat([prefix, prompt(9, seed)], dim=1)
            found = model.generate(ids, **given(copy.deepcopy(cache)), **OPTIONS)
            assert torch.equal(found, model.generate(ids, **OPTIONS))
    assert list(store.keys()) == []


def test_the_recipe_with_prefill_is_stored_and_exact() -> None:
    model, store = shared_model("llama"), MemoryStore()
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            cache.prefill(prompt())
            for seed in (3, 4):
                ids = torch.cat([prompt()[:, : CHUNKS * CHUNK], prompt(9, seed)], dim=1)
                plain = DynamicCache(config=model.config)
                run_ahead(model, ids, plain)
                assert difference(run(model, ids, copy.deepcopy(cache)), run(model, ids, plain)) == ""
    assert len(list(store.keys())) == CHUNKS + 1  # and the end of the prompt
