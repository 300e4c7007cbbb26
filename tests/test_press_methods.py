"""What the papers define: budgets are held, signals stop pruning, order is kept, nothing pruned is the full cache."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeError
from cake_hf.presses import (
    CORM,
    LESS,
    DBudgetKV,
    Kernels,
    KVMerger,
    Press,
    PressedCache,
    ThinK,
    load_kernels,
    save_kernels,
)
from cake_hf.presses.less import with_state
from models import build, prompt, run
from naming import given
from pressed import document, logits_of, report_of

TOKENS = 135
QUESTION = 9


def kernels(rank: int = 4, seed: int = 0) -> list[Kernels]:
    """Of the small Llama, random."""
    drawn = torch.Generator().manual_seed(seed)

    def of(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn) / 4

    return [Kernels(of(4, 16, 8), of(4, 8, rank), of(2, 16, 8), of(2, 8, rank), of(2, rank, rank)) for _ in range(3)]


@cache
def sharp(dtype: str = "float32", attention: str = "sdpa") -> Any:
    """The small Llama with sharper attention: with random weights, every token gets about as much as any other."""
    model: Any = build("llama", dtype, attention)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(100)
    return model


def restored(model: Any, tokens: int = TOKENS) -> DynamicCache:
    return document(model, prompt(tokens))


def pressed(press: Press, tokens: int = TOKENS) -> PressedCache:
    model = sharp()
    return press(model, restored(model, tokens), prompt(tokens))


def asked(tokens: int = TOKENS, question: int = QUESTION) -> torch.Tensor:
    return torch.cat([prompt(tokens), prompt(question, seed=5)], dim=1)


NOTHING = [
    ThinK(ratio=0),
    ThinK(ratio=0.5, window=500),
    CORM(window=500),
    KVMerger(keep=1),
    DBudgetKV(threshold=0),
    LESS(kernels(), keep=1),
    LESS([], keep=1),
]
"""Each method with options under which it prunes nothing."""
SOMETHING = [
    ThinK(ratio=0.5),
    CORM(window=4),
    KVMerger(keep=0.5),
    DBudgetKV(threshold=0.02),
    LESS(kernels(), keep=0.25),
    LESS([], keep=0.25),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("press", NOTHING, ids=str)
def test_nothing_pruned_is_the_full_cache_bit_for_bit(press: Press, dtype: str, attention: str) -> None:
    model = sharp(dtype, attention)
    cache = restored(model)
    small = press(model, cache, prompt(TOKENS))
    assert small.report.error == 0
    if isinstance(
        press, LESS
    ):  # it decodes with as many entries as the prompt had, so the state begins with the question
        assert torch.equal(logits_of(model, small, asked()), logits_of(model, copy.deepcopy(cache), asked()))
    else:
        assert difference_but_kv(run(model, asked(), small), run(model, asked(), copy.deepcopy(cache)))


def difference_but_kv(one: Any, other: Any) -> bool:
    """Whether tokens and logits are bit for bit the same; ragged layers keep their KV elsewhere."""
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("press", SOMETHING, ids=str)
def test_something_pruned_is_smaller_and_differs(press: Press) -> None:
    """The negative control of the test before, and: what was measured is what attention then does."""
    model = sharp()
    small = pressed(press)
    report = small.report
    assert report.bytes_after < report.bytes_before
    assert report.bytes_after == small.nbytes
    assert report.error is not None
    assert 0 < report.error < 1
    assert not torch.equal(logits_of(model, small, asked()), logits_of(model, restored(model), asked()))


@pytest.mark.parametrize("question", [1, QUESTION])
@pytest.mark.parametrize("press", SOMETHING, ids=str)
def test_eager_and_sdpa_give_the_same(press: Press, question: int) -> None:
    ids, found = asked(question=question), []
    for attention in ("sdpa", "eager"):
        model = sharp(attention=attention)
        small = press(model, restored(model), prompt(TOKENS))
        found.append(logits_of(model, small, ids))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("press", [*SOMETHING, *NOTHING], ids=str)
def test_short_prompts_are_pressed_too(press: Press) -> None:
    for tokens in (1, 2, 7):
        small = pressed(press, tokens)
        assert small.get_seq_length() == tokens
        run(sharp(), asked(tokens), small)


# ThinK


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_think_zeroes_the_weakest_channels(ratio: float) -> None:
    """The layer computes what keys with zeroes in the dropped channels give, and those are the ones of the paper's score."""
    model, window = sharp(attention="eager"), 32
    cache = restored(model)
    small = ThinK(ratio)(model, cache, prompt(TOKENS))
    zeroed = copy.deepcopy(cache)
    for layer, thin in zip(zeroed.layers, small.layers, strict=True):
        kept = torch.zeros(1, 2, 1, 16).scatter_(-1, thin.kept[:, :, None], 1.0)
        assert int(kept.sum()) == 2 * (16 - int(16 * ratio))
        layer.keys[:, :, :-window] *= kept
    assert torch.allclose(logits_of(model, small, asked()), logits_of(model, zeroed, asked()), atol=1e-4)


def test_think_keeps_strong_channels() -> None:
    """A channel that is made strong in keys and queries is kept."""
    model: Any = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.view(-1, 16, 64)[:, 5] *= 30
    small = ThinK(0.75)(model, restored(model), prompt(TOKENS))
    assert all((layer.kept == 5).any(dim=-1).all() for layer in small.layers)


# CORM


def test_corm_keeps_what_a_recent_query_found_important() -> None:
    """Against the definition, by loops: at least 1/t of the attention of one of the last queries, or among the last keys."""
    model, window = sharp(), 16
    cache = restored(model)
    small = CORM(window)(model, cache, prompt(TOKENS))
    before = copy.deepcopy(cache)
    for layer in before.layers:
        layer.keys, layer.values = layer.keys[:, :, : TOKENS - window], layer.values[:, :, : TOKENS - window]
    eager: Any = sharp(attention="eager")
    with torch.no_grad():
        weights = eager(prompt(TOKENS)[:, -window:], **given(before), output_attentions=True).attentions
    for layer, of_layer in zip(small.layers, weights, strict=True):
        for head in range(2):
            kept = [
                place
                for place in range(TOKENS)
                if place >= TOKENS - window
                or any(
                    of_layer[0, query, row, place] >= 1 / (TOKENS - window + 1 + row)
                    for query in (2 * head, 2 * head + 1)
                    for row in range(window)
                )
            ]
            expected = cache.layers[small.layers.index(layer)].keys[:, head : head + 1, kept]
            assert torch.equal(layer.head_keys[head], expected)


def test_corm_goes_on_evicting_while_decoding() -> None:
    small = pressed(CORM(window=8))
    at_first = [layer.entries for layer in small.layers]
    run(sharp(), asked(), small, max_new_tokens=40)
    assert small.get_seq_length() == TOKENS + QUESTION + 39
    for layer, before in zip(small.layers, at_first, strict=True):
        assert layer.entries < before + QUESTION + 39
        assert [len(last) for last in layer.last] == [keys.shape[2] for keys in layer.head_keys]
        assert all(bool((last[:-8] >= layer.asked - 8).all()) for last in layer.last)


def test_a_longer_window_keeps_more() -> None:
    sizes = [sum(layer.entries for layer in pressed(CORM(window)).layers) for window in (4, 16, 64)]
    assert sizes == sorted(sizes)


# KVMerger


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.35, 0.1])
@pytest.mark.parametrize("heavy", [0.0, 0.1, 0.5])
def test_kvmerger_holds_its_budget(keep: float, heavy: float) -> None:
    small = pressed(KVMerger(keep=keep, heavy=heavy, window=8))
    assert all(layer.entries == max(round(keep * TOKENS), 8 + 1) for layer in small.layers)


def test_kvmerger_merges_equal_neighbours_without_loss() -> None:
    """Keys of neighbours are made equal: those are merged, in order, and what is left is the pairs' key and mean value."""
    model = sharp()
    cache = restored(model, 64)
    for layer in cache.layers:
        layer.keys[:, :, 1:48:2] = layer.keys[:, :, 0:48:2]
    small = KVMerger(keep=40 / 64, heavy=0, window=8)(model, cache, prompt(64))
    for layer, full in zip(small.layers, cache.layers, strict=True):
        assert layer.entries == 40
        assert torch.allclose(layer.keys[:, :, :24], full.keys[:, :, 0:48:2], atol=1e-6)
        assert torch.allclose(
            layer.values[:, :, :24], (full.values[:, :, 0:48:2] + full.values[:, :, 1:48:2]) / 2, atol=1e-6
        )
        assert torch.equal(layer.keys[:, :, 24:], full.keys[:, :, 48:])
        assert torch.equal(layer.values[:, :, 24:], full.values[:, :, 48:])


def test_kvmerger_weighs_by_a_gaussian_of_the_distance_to_the_pivot() -> None:
    from cake_hf.presses.kvmerger import _merged

    keys = torch.tensor([[[0.0, 0], [3, 0], [0, 1], [5, 5]]])
    values = torch.tensor([[[1.0], [2], [4], [9]]])
    found_keys, found_values = _merged(keys, values, torch.tensor([[3.0, 1, 2, 1]]), torch.tensor([[0, 0, 0, 1]]), 2)
    weights = torch.tensor([0.0, 9, 1]).div(-5).exp()  # 2 s^2 is the mean of 9 and 1
    weights = weights / weights.sum()
    assert torch.allclose(found_keys[0, 0], weights @ keys[0, :3])
    assert torch.allclose(found_values[0, 0], weights @ values[0, :3])
    assert torch.equal(found_keys[0, 1], keys[0, 3])


# DBudgetKV


@pytest.mark.parametrize("threshold", [0.001, 0.01, 0.05])
def test_dbudgetkv_stops_at_its_signal(threshold: float) -> None:
    """What is pruned changes the norm by no more than the threshold, and one entry more would change it by more."""
    model = sharp()
    cache = restored(model)
    small = DBudgetKV(threshold)(model, cache, prompt(TOKENS))
    from cake_hf.presses.window import record

    recorded = record(
        model, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], prompt(TOKENS), 32
    )
    for layer, full, seen in zip(small.layers, cache.layers, recorded, strict=True):
        pruned = TOKENS - int(layer.entries)
        attention = seen.scores(full.keys).double()

        def change(count: int, attention: torch.Tensor = attention) -> float:
            left = torch.cat([attention[..., :4], attention[..., 4 + count :]], dim=-1)
            return float(1 - left.norm() / attention.norm())

        assert change(pruned) <= threshold + 1e-9
        assert pruned == TOKENS - 4 - 32 or change(pruned + 1) > threshold
        assert torch.equal(layer.keys[:, :, :4], full.keys[:, :, :4])
        assert torch.equal(layer.keys[:, :, 4:], full.keys[:, :, 4 + pruned :])


def test_dbudgetkv_prunes_more_with_a_higher_threshold() -> None:
    sizes = [sum(layer.entries for layer in pressed(DBudgetKV(t)).layers) for t in (0.0, 0.001, 0.01, 0.1)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2


# LESS


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_less_keeps_its_budget_while_decoding(keep: float) -> None:
    small = pressed(LESS(kernels(), keep=keep))
    count, before = round(keep * TOKENS), small.nbytes
    assert all(layer.entries == count for layer in small.layers)
    run(sharp(), asked(), small, max_new_tokens=30)
    assert all(layer.entries == count for layer in small.layers)
    assert small.nbytes == before
    assert all(layer.evicted == TOKENS - count + QUESTION + 29 for layer in small.layers)


def test_the_state_of_less_is_the_sum_over_evicted_entries() -> None:
    """However they were evicted, at once or one by one while decoding, H and z are the sums of the paper."""
    model, made = sharp(), kernels()
    cache = restored(model)
    small = LESS(made, keep=0.25)(model, cache, prompt(TOKENS))
    for layer, full, one in zip(small.layers, cache.layers, made, strict=True):
        for head in range(2):
            gone = [
                place
                for place in range(TOKENS)
                if not (layer.keys[0, head] == full.keys[0, head, place]).all(dim=-1).any()
            ]
            assert len(gone) == layer.evicted
            psi = one.of_keys(full.keys)[0, head, gone]
            assert torch.allclose(layer.norm[0, head, :, 0], psi.sum(dim=0), rtol=1e-4)
            assert torch.allclose(layer.outer[0, head], psi.T @ full.values[0, head, gone], rtol=1e-3, atol=1e-4)


def test_a_state_that_knows_the_kernel_gives_attention_on_all_entries() -> None:
    """If phi(q) psi(k) were exp(q k), attention with the state would be exact: one evicted entry, and kernels made for it."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    right = torch.softmax(query @ keys.transpose(-1, -2) / 2, dim=-1) @ values

    class Known(Kernels):
        def of_queries(self, queries: torch.Tensor) -> torch.Tensor:
            return (queries @ keys[:, :, :1].transpose(-1, -2) / 2).exp()

    none = torch.empty(0)
    known = Known(none, none, none, none, none)
    found = with_state(
        known, query, keys[:, :, 1:], values[:, :, 1:], values[:, :, :1], torch.ones(1, 1, 1, 1), 0.5, None
    )
    assert torch.allclose(found, right, atol=1e-6)


def test_kernels_of_another_model_are_refused() -> None:
    with pytest.raises(CakeError, match="those of 1 layers, and this model has 3"):
        pressed(LESS(kernels()[:1]))


def test_kernels_come_back_from_their_file(tmp_path: Path) -> None:
    made = kernels()
    save_kernels(tmp_path / "less.safetensors", made)
    found = load_kernels(tmp_path / "less.safetensors")
    assert len(found) == 3
    for one, other in zip(made, found, strict=True):
        assert torch.equal(one.key_mix.bfloat16().float(), other.key_mix)
        assert torch.equal(one.query_in.bfloat16().float(), other.query_in)


def test_training_evicts_what_the_press_evicts_and_makes_the_press_better() -> None:
    """On the text that it was trained on, the press with the kernels is nearer to all KV than plain eviction is."""
    from training.train_less import Setting, train

    keep, text = 0.2, prompt(192, seed=1)
    setting = Setting(rank=4, hidden=8, steps=60, queries=32, keeps=(keep,), window=32)
    made = list(train(sharp(), [text], setting))
    assert all(error < without for _, error, without in made)
    assert all(one.key_mix.shape == (2, 4, 4) for one, _, _ in made)
    ids = text[:, :160]
    errors = [
        report_of(LESS(kept, keep)(sharp(), document(sharp(), ids), ids)).error or 0
        for kept in ([one for one, _, _ in made], [])
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: CORM(0),
        lambda: KVMerger(keep=2),
        lambda: KVMerger(heavy=-1),
        lambda: DBudgetKV(-0.1),
        lambda: LESS([], 7),
    ],
)
def test_options_that_make_no_sense_say_so(make: Any) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1|at least 1"):
        make()
