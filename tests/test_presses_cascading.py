"""Cascading KV: a budget that holds, sinks that stay, and sub-caches that reach back twice as far each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cake_hf import CakeError
from cake_hf.presses import CascadingKV
from cake_hf.presses.cascading import Cascade, CascadingLayer
from families import family_model, is_here
from models import prompt, run
from pressed import QUESTION, asked, document, logits_of, one_by_one, report_of, sharp

IDS = prompt()
TOKENS = IDS.shape[1]


def method(ratio: float = 0.5, **options: Any) -> CascadingKV:
    return CascadingKV(ratio, **{"sinks": 4, **options})


def layers_of(small: Any) -> list[CascadingLayer]:
    assert all(isinstance(layer, CascadingLayer) for layer in small.layers)
    return list(small.layers)


def filled(cascade: Cascade, tokens: int, score: dict[int, float]) -> list[int | None]:
    return [cascade.add(token, score) for token in range(tokens)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_nothing_dropped_is_the_full_cache_bit_for_bit(family: str, attention: str) -> None:
    model = sharp(family, attention=attention)
    for question in (1, QUESTION):
        full, ids = document(model, IDS), asked(IDS, question)
        found = run(model, ids, method(0)(model, full, IDS)).logits
        assert torch.equal(found, run(model, ids, copy.deepcopy(full)).logits)


@pytest.mark.parametrize("caches", [1, 3, 4])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.9, 1])
def test_the_budget_is_held_while_the_model_decodes(ratio: float, caches: int) -> None:
    model, ids = sharp(), asked(IDS, 1)
    small = method(ratio, caches=caches)(model, document(model, IDS), IDS)
    budget = int(TOKENS * (1 - ratio))
    assert report_of(small).entries == [budget] * 3
    run(model, ids, small, max_new_tokens=40)
    for layer in layers_of(small):
        assert layer.keys.shape[-2] == layer.values.shape[-2] == len(layer.tokens) == len(layer.score) == budget
        assert layer.seen == small.get_seq_length() == TOKENS + 40
        held = [token for one in layer.cascade.held for token in one]
        assert sorted(held) == layer.tokens[layer.cascade.sinks :]


def test_sinks_stay_and_order_is_kept() -> None:
    model, full = sharp(), document(sharp(), IDS)
    small = method(0.6)(model, full, IDS)
    for layer, right in zip(layers_of(small), full.layers, strict=True):
        assert layer.tokens[:4] == [0, 1, 2, 3]
        assert layer.tokens == sorted(set(layer.tokens))
        assert torch.equal(layer.keys, right.keys[:, :, layer.tokens])
        assert torch.equal(layer.values, right.values[:, :, layer.tokens])


def test_one_sub_cache_is_a_window_behind_sinks() -> None:
    """The paper's limit case: streaming with attention sinks."""
    cascade = Cascade([8], 2)
    assert filled(cascade, 50, dict.fromkeys(range(50), 0.0)) == [None] * 10 + list(range(2, 42))
    assert list(cascade.held[0]) == list(range(42, 50))


@pytest.mark.parametrize("caches", [2, 3, 4])
def test_each_sub_cache_reaches_back_twice_as_far(caches: int) -> None:
    """With falling scores no dropped token wins a place, so what stays in sub-cache i lies `2^i` apart."""
    tokens, size = 400, 8
    cascade = Cascade([size] * caches, 0)
    dropped = filled(cascade, tokens, {token: -float(token) for token in range(tokens)})
    for level, held in enumerate(cascade.held):
        gaps = {later - earlier for earlier, later in zip(held, list(held)[1:], strict=False)}
        assert gaps == {2**level}
    kept = [token for held in cascade.held for token in held]
    assert len(kept) == size * caches
    assert sorted([*kept, *(token for token in dropped if token is not None)]) == list(range(tokens))


def test_a_token_with_a_higher_score_wins_the_place() -> None:
    """A dropped token that is not taken in replaces the newest one if its score is not less, whatever its number."""
    for favourite in range(100, 108):
        score = {token: float(token == favourite) for token in range(200)}
        cascade = Cascade([16, 16, 16], 0)
        filled(cascade, 140, score)
        assert favourite in [token for held in cascade.held for token in held]
    other = Cascade([16, 16, 16], 0)
    filled(other, 140, {token: -float(token) for token in range(200)})
    assert not {*range(100, 108)} <= {token for held in other.held for token in held}


def test_dropped_entries_are_as_if_masked() -> None:
    """Positions are those of all tokens seen; a question of several tokens is causal."""
    model, ids = sharp(), asked(IDS)
    small = method(0.5)(model, document(model, IDS), IDS)
    kept = [layer.tokens for layer in layers_of(small)]
    full, handles = document(model, IDS), []
    for layer, tokens in zip(model.model.layers, kept, strict=True):

        def hide(module: Any, args: Any, options: dict[str, Any], tokens: list[int] = tokens) -> Any:
            mask = torch.full((QUESTION, TOKENS + QUESTION), torch.finfo(torch.float32).min).triu(TOKENS + 1)
            mask[:, sorted({*range(TOKENS)} - {*tokens})] = torch.finfo(torch.float32).min
            return args, {**options, "attention_mask": mask[None, None]}

        handles.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))
    right = logits_of(model, full, ids)
    for handle in handles:
        handle.remove()
    assert torch.allclose(logits_of(model, small, ids), right, atol=1e-4)


def test_scores_are_moving_averages_of_attention() -> None:
    model, ids = sharp(), asked(IDS, 1)
    small = method(0.5, decay=0.9)(model, document(model, IDS), IDS)
    before = [(list(layer.tokens), layer.score) for layer in layers_of(small)]
    logits_of(model, small, ids)
    for layer, (tokens, score) in zip(layers_of(small), before, strict=True):
        old = dict(zip(tokens, score.tolist(), strict=True))
        added = [
            value - 0.9 * old.get(token, 0.0) for token, value in zip(layer.tokens, layer.score.tolist(), strict=True)
        ]
        assert all(value >= -1e-6 for value in added)
        assert 0 < sum(added) <= 0.1 + 1e-5  # the weights of a query sum to 1


def test_several_tokens_and_one_by_one_agree_while_nothing_more_is_dropped() -> None:
    model, ids = sharp(), asked(IDS)
    small = method(0.5)(model, document(model, IDS), IDS)
    first = logits_of(model, copy.deepcopy(small), ids)
    assert torch.allclose(one_by_one(model, small, ids)[:, :1], first[:, :1], atol=1e-5)


def test_bytes_and_error_follow_the_budget() -> None:
    model, full = sharp(), document(sharp(), IDS)
    reports = [report_of(method(ratio)(model, full, IDS)) for ratio in (0, 0.3, 0.6, 0.9)]
    assert [report.bytes_after for report in reports] == [
        report.bytes_before * int(TOKENS * (1 - ratio)) // TOKENS
        for report, ratio in zip(reports, (0, 0.3, 0.6, 0.9), strict=True)
    ]
    errors = [report.error or 0 for report in reports]
    assert errors == sorted(errors)


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3", "qwen3_next"])
def test_other_layers_are_refused_in_one_sentence(family: str) -> None:
    if not is_here(family):
        pytest.skip("this transformers has no such family, or a cache of its own for it")
    model = family_model(family)
    with pytest.raises(CakeError, match=r"^CascadingKV.* is made for") as raised:
        CascadingKV()(model, document(model, prompt(60)), prompt(60))
    assert str(raised.value).count(". ") == 0


@pytest.mark.parametrize("options", [{"ratio": -1}, {"decay": 1.1}, {"caches": 0}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1|at least 1"):
        CascadingKV(**options)
