"""VL-Cache and Elastic Cache, on a restored prompt with images and on text."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, CakeError, MemoryStore
from cake_hf.presses import ClusterKV, ElasticCache, Press, ThinK, VLCache
from cake_hf.presses.vlcache import sparsity
from models import CHUNK, difference, prompt, run
from naming import given
from pressed import QUESTION, asked, document, logits_of, one_by_one, report_of, sharp
from vision_models import PLACE, QWEN, inputs_for, standard_parts, tokens_of, vision_model

IDS = prompt()
TOKENS = IDS.shape[1]
PLAIN = ("llava", "internvl")
"""Families that number the tokens of a prompt with images as those of any other."""


@cache
def restored(family: str) -> tuple[Any, CakeCache, torch.Tensor]:
    """A model, its cache with a prompt with two images that came from a store, and the prompt's ids."""
    model, inputs, store = vision_model(family), inputs_for(family, standard_parts(family)), MemoryStore()
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers cannot be given a part of an image, so none is restored")
    for _ in range(2):
        cache = CakeCache(model, store, chunk_size=CHUNK, strategy="load")
        model.generate(**inputs, **given(cache), max_new_tokens=1)
        assert cache.flush(60)
    assert cache.report.chunks_loaded > 0
    return model, cache, inputs["input_ids"]


def pressed(press: Press, family: str = "llava") -> Any:
    model, cache, ids = restored(family)
    return press(model, cache, ids)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("press", [VLCache(0), ElasticCache(0), ThinK(0)], ids=str)
def test_nothing_dropped_is_the_restored_prompt_bit_for_bit(press: Press, family: str) -> None:
    model, restored_cache, ids = restored(family)
    small = pressed(press, family)
    assert report_of(small).error == 0
    for question in (1, QUESTION):
        found = run(model, asked(ids, question), copy.deepcopy(small))
        assert difference(found, run(model, asked(ids, question), restored_cache.to_dynamic_cache())) == ""


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_vlcache_holds_the_budget_of_all_layers(ratio: float, family: str) -> None:
    model, _, ids = restored(family)
    small = pressed(VLCache(ratio), family)
    report = report_of(small)
    assert sum(report.entries) <= len(small.layers) * ids.shape[1] * (1 - ratio) + len(small.layers)
    assert report.bytes_after * ids.shape[1] * len(small.layers) == report.bytes_before * sum(report.entries)
    assert run(model, asked(ids), small).tokens.shape[1] == ids.shape[1] + QUESTION + 4


def test_vlcache_gives_layers_with_sparse_attention_less() -> None:
    press = VLCache(0.5)
    assert press.budgets([0.5, 0.5], 1000) == [500, 500]
    assert press.budgets([0.2, 0.6], 900) == [600, 300]
    assert press.budgets([0.0, 0.9, 0.9, 0.9], 1000)[0] == 1000
    assert press.budgets([0.5, 1.0], 1000)[1] == 10


def test_sparsity_counts_small_weights_that_the_query_sees() -> None:
    weights = torch.tensor([[[0.9, 0.1, 0.0, 0.0], [0.5, 0.001, 0.499, 0.0], [0.25, 0.25, 0.25, 0.25]]])
    assert sparsity(weights, 0.01) == pytest.approx(1 / 9)
    assert sparsity(weights, 0.2) == pytest.approx(2 / 9)
    assert sparsity(weights, 0.0) == 0


def test_vlcache_keeps_what_the_text_behind_the_images_attends_to() -> None:
    model, restored_cache, ids = restored("llava")
    small = pressed(VLCache(0.6, recent=0.25))
    full = restored_cache.to_dynamic_cache()
    text = ids.shape[1] - int((ids[0] == PLACE).nonzero()[-1]) - 1
    weights = attention_of(model, ids, text)
    for layer, right, one in zip(small.layers, full.layers, weights, strict=True):
        count = layer.keys.shape[-2]
        recent = int(count * 0.25)
        heads = right.keys.shape[1]
        score = one.sum(dim=1).unflatten(0, (heads, -1)).sum(dim=1)
        for head in range(heads):
            best = score[head, : ids.shape[1] - recent].topk(count - recent).indices.tolist()
            places = sorted([*best, *range(ids.shape[1] - recent, ids.shape[1])])
            assert torch.equal(layer.keys[:, head], right.keys[:, head, places])
            assert torch.equal(layer.values[:, head], right.values[:, head, places])


def attention_of(model: Any, ids: torch.Tensor, text: int) -> list[torch.Tensor]:
    """The reference: attention weights of the last tokens, as the model's eager attention computes them."""
    inputs = inputs_for("llava", standard_parts("llava"))
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    return [weights[0, :, -text:] for weights in output.attentions]


@pytest.mark.parametrize("press", [VLCache(), ThinK(window=32), ElasticCache(window=1000)], ids=str)
def test_the_window_ends_at_the_last_image(press: Press) -> None:
    """Tokens of an image that ran again without it would have other queries."""
    model = vision_model("llava")
    parts = (CHUNK + 3, "A", 12)
    inputs = inputs_for("llava", parts)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with torch.no_grad():
            model(**inputs, **given(cache), logits_to_keep=1)
        small = press(model, cache, inputs["input_ids"])
        assert report_of(small).error is not None
    shorter = inputs_for("llava", (CHUNK + 3, "A"))
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with torch.no_grad():
            model(**shorter, **given(cache), logits_to_keep=1)
        with pytest.raises(CakeError, match="text behind the last image, and there is none"):
            press(model, cache, shorter["input_ids"])
        kept = ClusterKV(0.5)(model, cache, shorter["input_ids"])  # looks at no queries
        assert report_of(kept).error is None
    assert tokens_of("llava", "A") == 4


def test_vlcache_is_for_prompts_with_images() -> None:
    model = sharp()
    with pytest.raises(CakeError, match="made for prompts with images") as raised:
        VLCache()(model, document(model, IDS), IDS)
    assert str(raised.value).count(". ") == 0


@pytest.mark.parametrize("press", [VLCache(), ElasticCache()], ids=str)
def test_models_with_windows_are_refused_in_one_sentence(press: Press) -> None:
    inputs, model = inputs_for("gemma3", standard_parts("gemma3")), vision_model("gemma3")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with torch.no_grad():
            model(**inputs, **given(cache), logits_to_keep=1)
        with pytest.raises(CakeError, match="is made for layers that keep a key and a value of each token") as raised:
            press(model, cache, inputs["input_ids"])
    assert str(raised.value).count(". ") == 0


@pytest.mark.parametrize("family", QWEN)
def test_a_model_that_numbers_images_goes_on_behind_them(family: str) -> None:
    model, restored_cache, ids = restored(family)
    model.generate(**inputs_for(family, standard_parts(family)), max_new_tokens=1)
    full, small = restored_cache.to_dynamic_cache(), pressed(ElasticCache(0), family)
    assert report_of(small).error == 0
    assert torch.equal(run(model, asked(ids), small).logits, run(model, asked(ids), full).logits)
    assert report_of(pressed(VLCache(0.5), family)).error


@pytest.mark.parametrize("family", QWEN)
def test_the_numbering_of_another_prompt_is_noticed(family: str) -> None:
    """These models keep the numbering of their last prompt, and a window is run by it."""
    model, _, _ = restored(family)
    model.generate(**inputs_for(family, (CHUNK + 3, "C", 12)), max_new_tokens=1)
    with pytest.raises(CakeError, match="numbers tokens otherwise") as raised:
        pressed(VLCache(), family)
    assert str(raised.value).count(". ") == 0


@pytest.mark.parametrize("press", [ThinK(), ElasticCache(), ClusterKV(0.5)], ids=str)
def test_the_ids_of_another_prompt_are_noticed(press: Press) -> None:
    model, full, almost = sharp(), document(sharp(), IDS), IDS.clone()
    almost[0, -5] = (almost[0, -5] + 1) % 128
    for ids in (prompt(seed=9), almost):
        with pytest.raises(CakeError, match="the ids are others"):
            press(model, full, ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_elastic_with_nothing_dropped_is_the_full_cache_bit_for_bit(family: str, attention: str) -> None:
    model = sharp(family, attention=attention)
    for question in (1, QUESTION):
        full, ids = document(model, IDS), asked(IDS, question)
        found = run(model, ids, ElasticCache(0)(model, full, IDS)).logits
        assert torch.equal(found, run(model, ids, copy.deepcopy(full)).logits)


@pytest.mark.parametrize("ratio", [0.001, 0.3, 0.5, 0.9, 1])
def test_elastic_holds_its_share_while_the_model_decodes(ratio: float) -> None:
    model, ids = sharp(), asked(IDS, 30)
    small = ElasticCache(ratio)(model, document(model, IDS), IDS)
    assert report_of(small).entries == [max(1, int(TOKENS * (1 - ratio)))] * 3
    for end in range(TOKENS + 1, ids.shape[1] + 1):
        logits_of(model, small, ids[:, :end])
        for layer in small.layers:
            assert layer.keys.shape[-2] == layer.values.shape[-2] == max(1, int(end * (1 - ratio))) or ratio > 0.9
            assert layer.keys.shape[-2] <= max(2, int(end * (1 - ratio)))
    assert small.get_seq_length() == ids.shape[1]


def test_elastic_merges_each_token_into_its_nearest_neighbour() -> None:
    """The reference, token by token: what is kept is the mean of all that are nearest to it."""
    model, full = sharp(), document(sharp(), IDS)
    press = ElasticCache(0.7)
    layers = press(model, full, IDS).layers
    for number, layer in enumerate(layers):
        score = attention_to(model, number)
        score[:4] = score[-1] = float("inf")
        anchors = sorted(score.topk(press.kept(TOKENS)).indices.tolist())
        groups: dict[int, list[int]] = {anchor: [] for anchor in anchors}
        for token in range(TOKENS):
            groups[min(anchors, key=lambda anchor: (abs(anchor - token), anchor))].append(token)
        for states, right in ((layer.keys, full.layers[number].keys), (layer.values, full.layers[number].values)):
            means = [right[:, :, group].mean(dim=2) for group in groups.values()]
            assert torch.allclose(states, torch.stack(means, dim=2), atol=1e-5)


def attention_to(model: Any, number: int) -> torch.Tensor:
    """Attention of the window's queries to each token, by the model's eager attention."""
    model = sharp(attention="eager")
    with torch.no_grad():
        output = model(IDS, output_attentions=True)
    return output.attentions[number][0, :, -32:].sum(dim=(0, 1))


def test_elastic_drops_the_entry_at_a_fixed_place() -> None:
    model, ids = sharp(), asked(IDS)
    small = ElasticCache(0.5, distance=10)(model, document(model, IDS), IDS)
    before = [layer.keys for layer in small.layers]
    one_by_one(model, small, ids)
    place = TOKENS // 2 - 10
    for layer, keys in zip(small.layers, before, strict=True):
        dropped = QUESTION - (ids.shape[1] // 2 - TOKENS // 2)
        assert torch.equal(layer.keys[:, :, :place], keys[:, :, :place])
        assert torch.equal(layer.keys[:, :, place : place + 10 - dropped], keys[:, :, place + dropped :])


def test_elastic_reports_bytes_and_error() -> None:
    model, full = sharp(), document(sharp(), IDS)
    reports = [report_of(ElasticCache(ratio)(model, full, IDS)) for ratio in (0, 0.3, 0.9)]
    assert [report.bytes_after * TOKENS for report in reports] == [
        report.bytes_before * int(TOKENS * (1 - ratio)) for report, ratio in zip(reports, (0, 0.3, 0.9), strict=True)
    ]
    errors = [report.error or 0 for report in reports]
    assert errors == sorted(errors)


@pytest.mark.parametrize("make", [VLCache, ElasticCache])
def test_a_share_is_a_share(make: Any) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        make(2)
