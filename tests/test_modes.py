"""All ways to generate: with a `CakeCache`, cold and warm, each gives what it gives with a `DynamicCache`.

Tokens are compared in every mode; logits bit for bit, with the same mode on the chunked schedule where `generate` has it, and
between cold and warm runs everywhere.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)

from cake_hf import CakeCache, MemoryStore, Report
from cake_hf.assets import RECALL_TINY
from families import here
from models import CHUNK, CHUNKS, build, difference, expected, prompt, run, run_ahead, shared_model
from naming import given
from old_versions import skipped_where_older_versions_fail
from streamed import Collector

ALL = here("llama", "gemma3", "qwen3_next")
QUIET = {"eos_token_id": None, "pad_token_id": 0}
NEW_TOKENS = 10
SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@cache
def model_of(family: str) -> torch.nn.Module:
    """llama: restored. gemma3: windows and full attention by turns. qwen3_next: linear and full attention by turns."""
    if family == "llama":
        return shared_model("llama")
    torch.manual_seed(0)
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=24, sliding_window_pattern=2)).eval()
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3NextConfig(**SMALL, **linear, **experts, shared_expert_intermediate_size=16,
                             layer_types=["linear_attention", "full_attention", "linear_attention"])  # fmt: skip
    return Qwen3NextForCausalLM(config).eval()


class StopAfter(StoppingCriteria):
    """Ends after that many new tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = input_ids.shape[1] >= prompt().shape[1] + self.tokens
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool)


CHUNKED = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "stopping": {"stopping_criteria": [StopAfter(4)]},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "min_p": {"do_sample": True, "min_p": 0.02, "typical_p": 0.9},
    "scores": {"output_scores": True},
}
"""One row, and `generate` itself can run the prompt in chunks: the oracle is bit for bit."""

OTHERS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "sampled_beams": {"num_beams": 2, "do_sample": True},
    "returned_beams": {"num_beams": 3, "num_return_sequences": 2},
    "return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},  # filled in below: another random model of the family
}
"""The oracle is the plain call: the same tokens in float32."""

TAKE_BACK = ("prompt_lookup", "assisted")
"""Modes that take tokens back. transformers refuses them where a model's state cannot go back, with any cache."""


def generate(model: torch.nn.Module, used: Any, **options: Any) -> Any:
    """The mode's result on the prompt, with all of its random numbers fixed."""
    if "assistant_model" in options:
        options = {**options, "assistant_model": assistant(type(model))}
    torch.manual_seed(0)
    options = {**QUIET, "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(prompt(), **given(used), return_dict_in_generate=True, output_logits=True, **options)


@cache
def assistant(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """A smaller random model for assisted decoding; most of what it proposes is refused, and that is the hard case."""
    del kind
    return build("qwen2", seed=3)


@cache
def saved(family: str) -> MemoryStore:
    """A store with all of the prompt's chunks."""
    store = MemoryStore()
    with CakeCache(model_of(family), store, chunk_size=CHUNK) as saving:
        saving.prefill(prompt())
    return store


def logits(result: Any) -> torch.Tensor:
    return torch.stack(result.logits)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("family", ALL)
def test_modes_of_one_row(family: str, mode: str) -> None:
    model, options = model_of(family), CHUNKED[mode]
    plain = generate(model, DynamicCache(config=model.config), **options)
    chunked = generate(model, DynamicCache(config=model.config), prefill_chunk_size=CHUNK, **options)
    with CakeCache(model, saved(family), chunk_size=CHUNK, strategy="load") as warm:
        restored = generate(model, warm, **options)
        loaded = warm.report.chunks_loaded
        assert loaded or warm.report.reason
    expected = chunked if loaded else plain
    assert torch.equal(restored.sequences, plain.sequences)
    assert torch.equal(logits(restored), logits(expected))
    if family == "llama":
        assert loaded == CHUNKS


@pytest.mark.parametrize("mode", OTHERS)
@pytest.mark.parametrize("family", ALL)
def test_other_generation_modes_give_the_plain_result(family: str, mode: str) -> None:
    model, options = model_of(family), OTHERS[mode]
    if family == "qwen3_next" and mode in TAKE_BACK:
        with CakeCache(model, saved(family), chunk_size=CHUNK) as used, pytest.raises(ValueError, match="stateful"):
            generate(model, used, **options)
        return
    with skipped_where_older_versions_fail():
        plain = generate(model, DynamicCache(config=model.config), **options)
    results = []
    for strategy in ("compute", "load"):
        with CakeCache(model, saved(family), chunk_size=CHUNK, strategy=strategy) as used:
            results.append(generate(model, used, **options))
            report = used.report
    cold, warm = results
    assert torch.equal(plain.sequences, warm.sequences)
    assert torch.equal(cold.sequences, warm.sequences)
    assert torch.equal(logits(cold), logits(warm))
    assert report.chunks_loaded or report.reason
    if family == "llama":
        assert report.chunks_loaded == CHUNKS


@pytest.mark.fault(
    "Prompt",
    "The caller wants hidden states, or attentions, of the whole prompt.",
    "The prompt is computed plainly, with the reason; after `prefill` they are those of the last piece.",
)
@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_what_is_wanted_of_all_tokens_is_computed(asked: str) -> None:
    """What was restored would have had its own in another call. Who has called `prefill` wants those of the rest."""
    model = shared_model("llama", "float32", "eager")
    options = {asked: True}
    plain = generate(model, DynamicCache(config=model.config), **options)
    chunked = generate(model, DynamicCache(config=model.config), prefill_chunk_size=CHUNK, **options)
    for ahead, expected_ones in ((False, plain), (True, chunked)):
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used:
            if ahead:
                used.prefill(prompt())
            found = generate(model, used, **options)
            assert (used.report.reason_code == "hidden-states") is not ahead
        steps = zip(*(getattr(one, asked.removeprefix("output_")) for one in (found, expected_ones)), strict=True)
        assert all(torch.equal(*pair) for one, other in steps for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [CHUNK, CHUNK + 5, 3 * CHUNK, 5, 10 * CHUNK * CHUNKS])
@pytest.mark.parametrize("family", ALL)
def test_the_users_own_prefill_chunk_size(family: str, size: int) -> None:
    """Each piece is a call of its own. Those of our size are on the schedule; others go on plainly, as on a `DynamicCache`."""
    model, store = model_of(family), MemoryStore()
    plain = generate(model, DynamicCache(config=model.config), prefill_chunk_size=size)
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK) as used:
            assert torch.equal(generate(model, used, prefill_chunk_size=size).sequences, plain.sequences)
    # Whatever was stored on the way serves the plain call bit for bit.
    chunked = generate(model, DynamicCache(config=model.config), prefill_chunk_size=CHUNK)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as used:
        restored = generate(model, used)
        assert used.report.chunks_loaded or size % CHUNK
    assert torch.equal(restored.sequences, chunked.sequences)
    assert torch.equal(logits(restored), logits(chunked))


@pytest.mark.parametrize("family", ALL)
def test_embeddings_are_computed(family: str) -> None:
    model = model_of(family)
    embeddings = model.get_input_embeddings()(prompt()).detach()
    options = {**QUIET, "inputs_embeds": embeddings, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**options, **given(DynamicCache(config=model.config)))
    for ids in ({}, {"input_ids": prompt()[:, :0]}):
        with CakeCache(model, saved(family), chunk_size=CHUNK) as used:
            assert torch.equal(model.generate(**ids, **options, **given(used)), plain)
            assert used.report.reason_code == "no-token-ids"


@pytest.mark.parametrize("family", ALL)
def test_a_streamer_gets_each_token(family: str) -> None:
    model, streamed = model_of(family), Collector()
    with CakeCache(model, saved(family), chunk_size=CHUNK, strategy="load") as used:
        result = generate(model, used, streamer=streamed)
    assert streamed.tokens == [*result.sequences[0].tolist(), -1]


def test_contrastive_search_is_no_longer_in_transformers() -> None:
    """It is code on the Hub now, which a test that needs no network cannot run. Should it come back, this says so."""
    model = shared_model("llama")
    with (
        CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used,
        pytest.raises(ValueError, match="contrastive-search"),
    ):
        generate(model, used, penalty_alpha=0.6, top_k=4)


# With text: the small model that comes with the package.


@cache
def text_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(RECALL_TINY).eval()


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(RECALL_TINY)


TEXT = "The harbour was quiet and the boats lay still. " * 12
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def test_a_streamer_in_another_thread() -> None:
    inputs = tokenizer()(TEXT, return_tensors="pt")
    expected = text_model().generate(**inputs, max_new_tokens=8, do_sample=False)
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    with CakeCache(text_model(), MemoryStore(), chunk_size=CHUNK) as used:
        options = {**inputs, **given(used), "streamer": streamer, "max_new_tokens": 8, "do_sample": False}
        thread = threading.Thread(target=text_model().generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join(60)
    assert text == tokenizer().decode(expected[0, inputs.input_ids.shape[1] :])


def test_pipeline() -> None:
    """The text-generation pipeline hands the cache on to `generate`."""
    pipe = pipeline("text-generation", model=text_model(), tokenizer=tokenizer())
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    plain = pipe(TEXT, **options)
    store = MemoryStore()
    for turn in range(2):
        with CakeCache(text_model(), store, chunk_size=CHUNK, strategy="load") as used:
            assert pipe(TEXT, **given(used), **options) == plain
            assert bool(used.report.chunks_loaded) == bool(turn)


def test_pipeline_with_a_batch() -> None:
    """Texts of different lengths: the pipeline pads them on the left, and hands the mask on."""
    padding = AutoTokenizer.from_pretrained(RECALL_TINY, padding_side="left")
    padding.pad_token = padding.pad_token or padding.eos_token
    pipe = pipeline("text-generation", model=text_model(), tokenizer=padding)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False, "batch_size": 2}
    texts = [TEXT, "Far out a light was seen. " * 9]
    plain = pipe(texts, **options)
    store = MemoryStore()
    for turn in range(2):
        with CakeCache(text_model(), store, chunk_size=CHUNK, strategy="load") as used:
            assert pipe(texts, **given(used), **options) == plain
            assert used.report.batch == 2
            assert bool(used.report.chunks_loaded) == bool(turn)


def ask(store: Any, turns: int) -> list[Report]:
    """A chat of so many turns, as a server keeps it: the whole conversation, with a new cache, at each turn."""
    messages: list[dict[str, str]] = [{"role": "system", "content": TEXT}]
    reports = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}: what do you see at the harbour?"})
        inputs = tokenizer().apply_chat_template(
            messages, chat_template=CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        start = inputs["input_ids"].shape[1]
        with CakeCache(text_model(), store, chunk_size=CHUNK, strategy="load") as used:
            output = text_model().generate(**inputs, **given(used), max_new_tokens=24, do_sample=False)
            reports.append(used.report)
        plain = text_model().generate(**inputs, max_new_tokens=24, do_sample=False)
        assert torch.equal(output, plain)
        messages.append(
            {"role": "assistant", "content": tokenizer().decode(output[0, start:], skip_special_tokens=True)}
        )
    return reports


def test_chat_hits_grow_from_turn_to_turn() -> None:
    reports = ask(MemoryStore(), 4)
    loaded = [report.chunks_loaded for report in reports]
    assert loaded[0] == 0
    assert loaded == sorted(set(loaded)), "each turn finds more than the one before it"
    for before, after in pairwise(reports):
        assert after.chunks_loaded >= before.tokens // CHUNK - 1, "a turn finds all full chunks of the one before"


def test_chat_goes_on_in_another_process(tmp_path: Path) -> None:
    """Two turns elsewhere; here the whole chat, whose first two turns are found."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_modes\n"
        "print(sum(report.tokens // test_modes.CHUNK for report in test_modes.ask(sys.argv[2], 2)))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True, timeout=280, capture_output=True)
    first, second, third = ask(tmp_path, 3)
    assert first.chunks_computed == second.chunks_computed == 0
    assert third.chunks_loaded >= second.chunks_loaded + second.chunks_computed
    assert third.chunks_computed > 0


def test_chat_with_one_cache_that_is_kept() -> None:
    """As people do it at a prompt: the cache goes on from where it is, and only what is new runs."""
    model, kept = text_model(), {}
    for name in ("dynamic", "cake"):
        used = (
            DynamicCache(config=model.config)
            if name == "dynamic"
            else CakeCache(model, MemoryStore(), chunk_size=CHUNK)
        )
        ids = tokenizer()(TEXT, return_tensors="pt").input_ids
        for turn in range(3):
            more = tokenizer()(
                f" Question {turn}: and what else?", return_tensors="pt", add_special_tokens=False
            ).input_ids
            ids = torch.cat([ids, more], dim=1)
            if name == "dynamic":
                run_ahead(model, ids, used)
            ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **given(used),
                max_new_tokens=9,
                do_sample=False,
            )
        kept[name] = ids
    assert torch.equal(kept["dynamic"], kept["cake"])


def test_a_default_device_of_the_callers_is_not_ours() -> None:
    """Many scripts set the GPU to be what new tensors are made on. Here it is one that has no content at all."""
    model, ids, store, plain = shared_model("llama"), prompt(), MemoryStore(), expected()
    with torch.device("meta"):
        for strategy, loaded in (("both", 0), ("load", CHUNKS)):
            with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
                assert difference(run(model, ids, cache), plain) == ""
                assert cache.flush(60)
            assert cache.report.chunks_loaded == loaded
    assert len(list(store.keys())) == CHUNKS


def test_no_cache_of_ours_makes_generate_compile() -> None:
    """It would on a GPU, where all layers are of a kind that can be compiled, unless the cache is a plain `DynamicCache`."""
    model = shared_model("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert not cache.is_compileable
        cache.layers = [SimpleNamespace(is_compileable=True)]
        assert not cache.is_compileable
