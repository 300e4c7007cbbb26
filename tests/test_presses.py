"""The interface of presses: the restored cache stays as it is, masks are right, and nothing pruned is the full cache."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import cake_hf
from cake_hf import CakeCache, CakeError, MemoryStore
from cake_hf.presses import Prefix, Press, PressedLayer, RaggedLayer, ThinK
from families import FAMILIES as FAMILIES_OF_ALL_KINDS
from families import family_model, is_here
from models import CHUNK, Outcome, build, difference, prompt, run, shared_model
from naming import given, mask_sizes
from pressed import document, logits_of
from source_imports import import_statements

QUESTION = 9
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gpt_neox"]


@dataclass(frozen=True)
class Everything(Press):
    """Keeps all entries."""

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        return prefix.plain_layer(number)


@dataclass(frozen=True)
class Last(Press):
    """Keeps the last entries, in each layer as many as are given for it."""

    kept: tuple[int, ...]

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        count = self.kept[number % len(self.kept)]
        return PressedLayer(prefix.keys[number][:, :, -count:], prefix.values[number][:, :, -count:], prefix.tokens)


@dataclass(frozen=True)
class LastOfHead(Press):
    """Keeps the last entries, in each head as many as are given for it."""

    kept: tuple[int, ...]

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        def of_heads(states: torch.Tensor) -> list[torch.Tensor]:
            return [states[:, head : head + 1, -count:] for head, count in enumerate(self.kept)]

        return RaggedLayer(of_heads(prefix.keys[number]), of_heads(prefix.values[number]), prefix.tokens)


def asked(question: int = QUESTION) -> torch.Tensor:
    """The prompt with a question behind it."""
    return torch.cat([prompt(), prompt(question, seed=5)], dim=1)


@pytest.fixture
def restored() -> Iterator[CakeCache]:
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK, strategy="load") as cache:
        cache.prefill(prompt())
        assert cache.flush(60)
        yield cache


def masked(model: Any, ids: torch.Tensor, hidden: list[slice]) -> torch.Tensor:
    """The reference for dropped entries: the logits of the question when the mask of each layer hides them."""
    cache, length = document(model, prompt()), prompt().shape[1]
    new = ids.shape[1] - length
    layers = model.model.layers
    handles = []
    for layer, gone in zip(layers, hidden, strict=True):

        def hide(module: Any, args: Any, kwargs: dict[str, Any], gone: slice = gone) -> Any:
            mask = torch.full((new, length + new), torch.finfo(torch.float32).min).triu(length + 1)
            mask[:, gone] = torch.finfo(torch.float32).min
            return args, {**kwargs, "attention_mask": mask[None, None]}

        handles.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))
    with torch.no_grad():
        logits: torch.Tensor = model(ids[:, length:], **given(cache)).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_is_the_full_cache_bit_for_bit(family: str, attention: str) -> None:
    model = build(family, attention=attention)
    for question in (1, QUESTION):
        ids = asked(question)
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            cache.prefill(prompt())
            for press in (Everything(), ThinK(ratio=0)):
                small = press(model, cache)
                assert small.report.error == 0
                assert small.report.bytes_after == small.report.bytes_before
                found = run(model, ids, small)
                expected = run(model, ids, copy.deepcopy(cache))
                assert difference(found, expected) == ""


@pytest.mark.parametrize("kept", [(40, 40, 40), (60, 20, 90), (135, 20, 50)], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("question", [1, QUESTION])
def test_dropped_entries_are_as_if_masked(kept: tuple[int, ...], attention: str, question: int) -> None:
    """Positions are those of all tokens seen, and a question of several tokens is causal, however much each layer keeps."""
    model: Any = build("llama", attention=attention)
    ids = asked(question)
    small = Last(kept)(model, document(model, prompt()))
    assert small.get_seq_length() == prompt().shape[1]
    right = masked(model, ids, [slice(0, prompt().shape[1] - count) for count in kept])
    found = logits_of(model, small, ids)
    assert torch.allclose(found, right, atol=1e-5)
    assert not torch.allclose(found, logits_of(model, document(model, prompt()), ids), atol=1e-5)


@pytest.mark.parametrize("question", [1, QUESTION])
def test_heads_may_keep_different_entries(question: int) -> None:
    model, ids = shared_model("llama"), asked(question)
    cache = document(model, prompt())
    same = logits_of(model, LastOfHead((50, 50))(model, cache), ids)
    assert torch.allclose(same, logits_of(model, Last((50,))(model, cache), ids), atol=1e-5)
    other = LastOfHead((50, 20))(model, cache)
    assert other.report.entries == [35.0] * 3
    assert not torch.allclose(logits_of(model, other, ids), same, atol=1e-5)


def test_generate_goes_on_token_by_token() -> None:
    """What `generate` decodes is what forwards of one token at a time give."""
    model, ids = shared_model("llama"), asked()
    cache = document(model, prompt())
    made = run(model, ids, Last((60, 20, 90))(model, cache)).tokens
    small = Last((60, 20, 90))(model, cache)
    for end in range(ids.shape[1], made.shape[1]):
        assert logits_of(model, small, made[:, :end])[0, -1].argmax() == made[0, end]
        assert small.get_seq_length() == end


@pytest.mark.fault(
    "KV", "A restored cache is pressed.", "The press works on a copy; the cache goes on, bit for bit as before."
)
def test_the_restored_cache_is_not_changed(restored: CakeCache) -> None:
    model, ids = restored._session.model, asked()
    expected = run(model, ids, copy.deepcopy(restored))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in restored.layers]
    for press in (ThinK(ratio=0.5), Last((10, 20, 30)), LastOfHead((5, 9))):
        run(model, ids, press(model, restored))
    assert all(
        torch.equal(layer.keys, key) and torch.equal(layer.values, value)
        for layer, (key, value) in zip(restored.layers, before, strict=True)
    )
    assert difference(run(model, ids, restored), expected) == ""


@pytest.mark.fault("KV", "A pressed cache decodes beside a store.", "Nothing of it is stored.")
def test_nothing_pressed_is_stored() -> None:
    model, store = shared_model("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        assert cache.flush(60)
        keys = set(store.keys())
        run(model, asked(), ThinK()(model, cache), max_new_tokens=3 * CHUNK)
        assert cache.flush(60)
        assert set(store.keys()) == keys


@pytest.mark.fault(
    "KV", "A prompt is restored while a pressed cache of the same model lives.", "The same keys and the same bits."
)
def test_other_caches_of_the_model_compute_as_before() -> None:
    """While a pressed cache lives, prompts have the same keys and the same bits, and its end leaves no trace."""
    model = build("llama")
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    expected = run(model, asked(), document(model, prompt()))
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        assert cache.flush(60)
        small = ThinK()(model, cache)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        assert cache.prefill(prompt()).chunks_computed == 0
        assert difference(run(model, asked(), cache), expected) == ""
    assert difference(run(model, asked(), document(model, prompt())), expected) == ""
    other = copy.deepcopy(small)
    del small
    gc.collect()
    run(model, asked(), other)
    del other
    gc.collect()
    assert all(
        now is before
        for now, before in zip(
            (module.config for module in model.modules() if hasattr(module, "config")), configs, strict=True
        )
    )


def test_a_copy_of_a_pressed_model_is_plain() -> None:
    model: Any = build("llama")
    small = ThinK()(model, document(model, prompt()), prompt())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.model.layers[0].self_attn.config) is type(copied.config)
    assert small.get_seq_length() == prompt().shape[1]


@pytest.mark.fault(
    "KV", "Threads with different pressed caches run one model.", "Each gets the tokens that it gets alone."
)
def test_threads_with_pressed_and_plain_caches_share_a_model() -> None:
    model, ids = shared_model("llama"), asked()
    cache = document(model, prompt())
    presses: list[Press] = [Everything(), Last((60, 20, 90)), ThinK(0.5), LastOfHead((50, 20))]

    def answer(number: int) -> Outcome:
        press = presses[number % len(presses)]
        return run(model, ids, press(model, cache, prompt()))

    alone = [answer(number).tokens for number in range(len(presses))]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(12)))
    assert all(torch.equal(found.tokens, alone[number % len(presses)]) for number, found in enumerate(together))


def test_copies_are_independent() -> None:
    model, cache = shared_model("llama"), document(shared_model("llama"), prompt())
    small = ThinK(0.5)(model, cache, prompt())
    first = run(model, asked(), copy.deepcopy(small))
    run(model, asked(3), copy.deepcopy(small))
    assert difference(run(model, asked(), small), first) == ""


def test_the_end_of_the_document_is_pressed_too(restored: CakeCache) -> None:
    """`prefill` shows whole chunks until the question comes; a press takes the whole document."""
    assert restored.get_seq_length() < prompt().shape[1]
    assert Everything()(restored._session.model, restored).get_seq_length() == prompt().shape[1]
    short = prompt(CHUNK - 3)
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(short)
        assert ThinK(0.5, window=4)(shared_model("llama"), cache).get_seq_length() == short.shape[1]


def test_bytes_and_error_are_reported(restored: CakeCache) -> None:
    model, tokens = restored._session.model, prompt().shape[1]
    reports = [ThinK(ratio)(model, restored).report for ratio in (0.0, 0.25, 0.5, 0.75)]
    sizes = [report.bytes_after for report in reports]
    errors = [report.error for report in reports if report.error is not None]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert len(set(errors)) == len(reports)
    first = reports[0]
    assert (first.tokens, first.bytes_before) == (tokens, 3 * 2 * 2 * tokens * 16 * 4)
    small = ThinK(0.5)(model, restored, measure=False)
    assert small.report.error is None
    before = small.nbytes
    logits_of(model, small, asked())
    assert small.nbytes == before + 3 * 2 * 2 * QUESTION * 16 * 4


def test_views_do_not_keep_the_prefix(restored: CakeCache) -> None:
    small = ThinK(0.5)(restored._session.model, restored)
    for layer in small.layers:
        for tensor in layer.state():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_mask_sizes_start_where_the_kept_entries_do() -> None:
    small = Last((30,))(shared_model("llama"), document(shared_model("llama"), prompt()))
    assert mask_sizes(small.layers[0], 5) == (35, prompt().shape[1] - 30)


OF_KEYS_AND_VALUES = {"llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "olmo2", "granite", "gpt_neox", "gpt2"}
"""Families that keep a key and a value of each token, in attention that goes through transformers' functions."""


@pytest.mark.fault(
    "Model",
    "A press is applied to layers that it is not made for: windows, states, latents, shared KV.",
    "One sentence, and no answer.",
)
@pytest.mark.parametrize("family", list(FAMILIES_OF_ALL_KINDS))
def test_each_family_is_pressed_or_refused_in_one_sentence(family: str) -> None:
    """Windows, chunks, states, latents, indexers, shared KV, attention of a family's own: one sentence, and no wrong answer."""
    if not is_here(family):
        pytest.skip("this transformers has no such family, or a cache of its own for it")
    model = family_model(family)
    cache = document(model, prompt(60))
    ids = torch.cat([prompt(60), prompt(QUESTION, seed=5)], dim=1)
    if family in OF_KEYS_AND_VALUES:
        small = Everything()(model, cache, prompt(60))
        assert torch.equal(logits_of(model, small, ids), logits_of(model, cache, ids))
        return
    with pytest.raises(CakeError, match=r"^[^.]*is made for|^[^.]*does not go through") as raised:
        Everything()(model, cache, prompt(60))
    assert str(raised.value).count(". ") == 0


@pytest.mark.fault(
    "Prompt",
    "A press gets an empty cache, several rows, other ids or a pressed cache.",
    "An error that says what to do.",
)
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model, cache: ThinK()(model, DynamicCache(config=model.config)), "holds no tokens"),
        (lambda model, cache: ThinK()(model, cache), "pass its token ids"),
        (lambda model, cache: ThinK()(model, cache, prompt(5)), "have the shape"),
        (lambda model, cache: ThinK()(model, cache, prompt().repeat(2, 1)), "have the shape"),
        (lambda model, cache: ThinK()(model, ThinK(0)(model, cache, prompt())), "pressed already"),
        (lambda model, cache: ThinK()(model, document(model, prompt().repeat(2, 1))), "2 rows"),
        (lambda model, cache: Everything()(model, cache).crop(-1), "cannot be cropped"),
        (lambda model, cache: Everything()(model, cache).reset(), "cannot be cropped"),
        (
            lambda model, cache: model(prompt(3).repeat(2, 1), **given(Everything()(model, cache))),
            "goes on with one prompt",
        ),
    ],
)
def test_calls_that_make_no_sense_say_so(call: Any, says: str) -> None:
    model = shared_model("llama")
    with pytest.raises(CakeError, match=says):
        call(model, document(model, prompt()))


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ThinK(ratio)


@pytest.mark.fault(
    "KV",
    "A forward with a pressed cache ends between its KV and its attention.",
    "The next forward of any cache is as if it had not been.",
)
def test_a_forward_that_fails_does_not_send_the_next_one_astray() -> None:
    model: Any = build("llama")
    cache = document(model, prompt())
    small = Last((20,))(model, cache)
    expected = run(model, asked(), Last((20,))(model, cache))
    states = torch.randn(1, 2, 1, 16)
    copy.deepcopy(small).update(states, states, 1)  # what an interrupt between update and attention leaves behind
    assert difference(run(model, asked(), document(model, prompt())), run(model, asked(), cache)) == ""
    copy.deepcopy(small).update(states, states, 0)
    assert difference(run(model, asked(), small), expected) == ""


def test_nothing_else_in_the_package_imports_presses() -> None:
    source = Path(cake_hf.__path__[0])
    users = {
        path.relative_to(source).parts[0]
        for path in source.rglob("*.py")
        for target, _ in import_statements(path.read_text(encoding="utf-8"), "cake_hf.x")
        if target.startswith("cake_hf.presses")
    }
    assert users == {"presses"}
